"""Reading files that users wrote: every fault of theirs is an error with a message, never a traceback."""
