"""Exit codes of every `quiver` command, the same for all of them."""

FAILED = 1
MISUSED = 2

# Ends the help of each command.
EXIT_CODES = """\
Exit codes: 0 done; 1 it failed while it ran (the training, the server, the network, a disk, a store); 2 something given
is wrong (an option, a file, a base, an adapter, a recipe, a request) and nothing was started; 130 and 143 stopped by
SIGINT and SIGTERM.
"""
