"""English prose out of the running interpreter's own standard library: language topics, docstrings and comments.

Every Python brings this text along under the PSF licence, so nothing has to be downloaded or shipped. It differs a
little between versions of Python.
"""

import ast
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

MAX_DOCUMENT_CHARACTERS = 1600
MIN_PARAGRAPH_CHARACTERS = 40
MIN_PLAIN_SHARE = 0.94  # of the characters: letters, spaces and everyday punctuation
MIN_WORD_SHARE = 0.75  # of the words: lower case letters alone, but for an initial capital and punctuation around

# Folders of a standard library that hold tests, generated tables or other people's packages.
_SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data", "_vendor"}

_ROLE = re.compile(r":[a-z:+]+:`~?([^`]*)`")
_MARKUP = re.compile(r"``|`|\*\*|(?<!\w)\*(?=\w)|(?<=\w)\*(?!\w)")
_FOOTNOTE = re.compile(r" ?\[\w+\]_?")
_PLAIN = re.compile(r"[A-Za-z ,.;:'\"!?()-]")
_WORD = re.compile(r"[\"'(]*[A-Za-z]?[a-z'-]*[\"'),.;:!?]*")
_NOT_PROSE = re.compile(r"copyright|licen[cs]e|>>>|https?:|[{}<>=|\\]|TODO|XXX|@|\bself\b", re.IGNORECASE)


def python_documents() -> list[str]:
    """Documents of a few paragraphs each, up to about 1600 characters, in the order of the library; none twice.

    Raises:
        FileNotFoundError: this Python has no standard library in source form.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    if not (library / "argparse.py").is_file():
        raise FileNotFoundError(
            f"{library} holds no sources of the standard library; use a Python installed with its .py files"
        )
    seen: set[str] = set()
    documents: list[str] = []
    for blocks in _sources(library):
        paragraphs: list[str] = []
        for block in blocks:
            paragraph = _clean(block)
            if _is_prose(paragraph) and paragraph not in seen:
                seen.add(paragraph)
                paragraphs.append(paragraph)
        documents.extend(_documents(paragraphs))
    return documents


def _sources(library: Path) -> Iterator[Iterator[str]]:
    """The blocks of text of each topic and of each module."""
    typed_topics: dict[str, str] = topics
    for topic in sorted(typed_topics):
        yield _blocks(typed_topics[topic])
    for path in sorted(library.rglob("*.py")):
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(library).parts):
            yield _module_blocks(path)


def _module_blocks(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules are not our concern
        tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _blocks(ast.get_docstring(node) or "")
    with tokenize.open(path) as file:
        lines = [line.strip() for line in file]
    comments = [line[1:].strip() if line.startswith("#") else "" for line in lines]
    yield from _blocks("\n".join(comments))


def _blocks(text: str) -> Iterator[str]:
    """The stretches of lines of equal indentation between blank lines; code, lists and tables fall out later."""
    for block in re.split(r"\n\s*\n", text):
        lines = block.splitlines()
        indents = {len(line) - len(line.lstrip()) for line in lines if line.strip()}
        if len(indents) == 1:
            yield " ".join(line.strip() for line in lines)


def _clean(block: str) -> str:
    """Without reStructuredText markup; one space between words."""
    text = _FOOTNOTE.sub("", _MARKUP.sub("", _ROLE.sub(r"\1", block)))
    return " ".join(text.replace("--", "-").split())


def _is_prose(paragraph: str) -> bool:
    if len(paragraph) < MIN_PARAGRAPH_CHARACTERS or not paragraph[0].isupper() or paragraph[-1] not in ".!?:":
        return False
    if _NOT_PROSE.search(paragraph):
        return False
    words = paragraph.split()
    num_plain = len(_PLAIN.findall(paragraph))
    num_words = sum(_WORD.fullmatch(word) is not None for word in words)
    return num_plain >= MIN_PLAIN_SHARE * len(paragraph) and num_words >= MIN_WORD_SHARE * len(words)


def _documents(paragraphs: list[str]) -> Iterator[str]:
    document = ""
    for paragraph in paragraphs:
        if document and len(document) + len(paragraph) > MAX_DOCUMENT_CHARACTERS:
            yield document
            document = ""
        document += ("\n\n" if document else "") + paragraph
    if document:
        yield document
