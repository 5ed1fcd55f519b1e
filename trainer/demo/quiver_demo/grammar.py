r"""A small text grammar: rules with alternatives, choices and memory, expanded with a seeded random generator.

A grammar is text. A line that ends in a colon names a rule; the indented lines below it are its alternatives, drawn
with equal chance (`3* text` counts three times); `#` begins a comment line. Inside an alternative:

    <rule>          a fresh expansion of `rule`           <^rule>   the same with its first letter in upper case
    {rule#1}        `rule` expanded once per text and remembered under that number; two numbers give two values
    {^rule#1}       the same with its first letter in upper case
    {rule#1.first}  a part of a remembered value: `first` word, `last` word, `rest` (all words but the first), `lower`
    <rule@key>      the rule `rule_VALUE`, where VALUE is the value remembered for the rule `key`
    (a|b|c)         one of these                          [a]       this or nothing
    a~              the article "a" or "an", by the letter that follows ("A~" likewise)
    \n              a new line; a backslash before any other character takes that character as it is

Only `Random.random()` is used, so the same seed gives the same text on every version of Python.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

MAX_REDRAWS = 20  # tries to make `{rule#2}` differ from `{rule#1}` before a repeat is accepted

_RULE_LINE = re.compile(r"([a-z][a-z0-9_]*):")
_WEIGHT = re.compile(r"(\d+)\* ")
_FRESH = re.compile(r"(\^?)([a-z][a-z0-9_]*)(?:@([a-z][a-z0-9_]*))?")
_REMEMBERED = re.compile(r"(\^?)(([a-z][a-z0-9_]*)#\d+)(?:\.(first|last|rest|lower))?")
_ARTICLE = re.compile(r"\b([Aa])~( [^A-Za-z]*([A-Za-z])?)")
_SPACES = re.compile(r" {2,}")
_SPACE_BEFORE_BREAK = re.compile(r" +(?=[\n,.;?!]|$)")
_SPACE_AFTER_BREAK = re.compile(r"(?<=\n) +")

_PARTS: dict[str, Callable[[str], str]] = {
    "first": lambda value: value.split(" ", 1)[0],
    "last": lambda value: value.rsplit(" ", 1)[-1],
    "rest": lambda value: value.split(" ", 1)[-1],
    "lower": str.lower,
}


class GrammarError(ValueError):
    """The text of a grammar breaks a rule of the notation; the message names the line."""


@dataclass
class _State:
    """One expansion in progress."""

    draw: Callable[[], float]  # uniform in [0, 1)
    memory: dict[str, str]
    pieces: list[str] = field(default_factory=list[str])

    def take_from(self, start: int) -> str:
        """Removes and returns what was written since `start`."""
        text = "".join(self.pieces[start:])
        del self.pieces[start:]
        return text


Emit = Callable[[_State], None]


class Grammar:
    """Rules read from grammar text; `expand` turns one of them into a string.

    Args:
        text: the grammar in the notation of this module; several files may simply be joined.

    Raises:
        GrammarError: a line that is no rule and no alternative, a rule twice, empty or unknown, an open bracket.
    """

    def __init__(self, text: str) -> None:
        self._alternatives: dict[str, list[Emit]] = {}
        self._references: list[tuple[int, str, str]] = []  # (line number, rule, key or "")
        self.texts = _read_rules(text)
        for rule, lines in self.texts.items():
            self._alternatives[rule] = [
                emit for line_number, weight, line in lines for emit in [self._compile(line, line_number)] * weight
            ]
        for line_number, rule, key in self._references:
            self._check_reference(line_number, rule, key)

    def expand(self, rule: str, rng: Random, memory: Mapping[str, str] | None = None) -> str:
        """A random text of `rule`. `memory` holds values fixed beforehand, such as {"person#1": "Anna Keller"}."""
        state = _State(rng.random, dict(memory or {}))
        self._emit_rule(rule, state)
        return _tidy("".join(state.pieces))

    def values(self, rule: str) -> list[str]:
        """The alternatives of a rule that is a plain list of words, in their order."""
        return [line for _, _, line in self.texts[rule]]

    def _emit_rule(self, rule: str, state: _State) -> None:
        alternatives = self._alternatives[rule]
        alternatives[int(state.draw() * len(alternatives))](state)

    def _remember(self, slot: str, rule: str, state: _State) -> str:
        """The value of `slot` ("rule#1"), drawn now when it has none: unlike the other values of the same rule."""
        value = state.memory.get(slot)
        if value is None:
            others = {known for name, known in state.memory.items() if name.startswith(f"{rule}#")}
            for _ in range(MAX_REDRAWS):
                start = len(state.pieces)
                self._emit_rule(rule, state)
                value = state.take_from(start)
                if value not in others:
                    break
            assert value is not None
            state.memory[slot] = value
        return value

    def _check_reference(self, line_number: int, rule: str, key: str) -> None:
        wanted = [f"{rule}_{value}" for value in self.values(key)] if key in self.texts else [rule]
        for name in [key] * bool(key) + wanted:
            if name not in self.texts:
                raise GrammarError(f"line {line_number}: the rule '{name}' is used and defined nowhere")

    def _compile(self, line: str, line_number: int) -> Emit:
        emit, end = self._compile_until(line, 0, "", line_number)
        assert end == len(line)
        return emit

    def _compile_until(self, line: str, start: int, closer: str, line_number: int) -> tuple[Emit, int]:
        """Compiles from `start` to the bracket `closer` ("" is the end of the line); returns the place after it."""
        branches: list[list[Emit]] = [[]]
        position = start
        while position < len(line):
            character = line[position]
            if character == closer:
                return _choice([_sequence(branch) for branch in branches]), position + 1
            if character == "|" and closer == ")":
                branches.append([])
                position += 1
            else:
                emit, position = self._compile_item(line, position, line_number)
                branches[-1].append(emit)
        if closer:
            raise GrammarError(f"line {line_number}: '{line[start - 1]}' is never closed by '{closer}'")
        return _sequence(branches[0]), position

    def _compile_item(self, line: str, position: int, line_number: int) -> tuple[Emit, int]:
        character = line[position]
        if character == "(":
            return self._compile_until(line, position + 1, ")", line_number)
        if character == "[":
            emit, position = self._compile_until(line, position + 1, "]", line_number)
            return _choice([emit, _literal("")]), position
        if character in "<{":
            return self._compile_reference(line, position, line_number)
        if character == "\\":
            escaped = line[position + 1 : position + 2]
            return _literal("\n" if escaped == "n" else escaped), position + 2
        if character in "])}>":
            raise GrammarError(f"line {line_number}: '{character}' closes nothing; write \\{character} for the sign")
        end = position
        while end < len(line) and line[end] not in "(|)[]<>{}\\":
            end += 1
        if end == position:  # a bar outside of a choice
            raise GrammarError(f"line {line_number}: '|' stands outside of a choice; write \\| for the sign")
        return _literal(line[position:end]), end

    def _compile_reference(self, line: str, position: int, line_number: int) -> tuple[Emit, int]:
        fresh = line[position] == "<"
        end = line.find(">" if fresh else "}", position)
        match = (_FRESH if fresh else _REMEMBERED).fullmatch(line[position + 1 : max(end, 0)])
        if match is None:
            raise GrammarError(f"line {line_number}: cannot read the reference that begins {line[position:][:30]!r}")
        emit = self._fresh(match, line_number) if fresh else self._remembered(match, line_number)
        return (_capital(emit) if match[1] else emit), end + 1

    def _fresh(self, match: re.Match[str], line_number: int) -> Emit:
        rule, key = match[2], match[3] or ""
        self._references.append((line_number, rule, key))
        if key:
            return lambda state: self._emit_rule(f"{rule}_{self._remember(key, key, state)}", state)
        return lambda state: self._emit_rule(rule, state)

    def _remembered(self, match: re.Match[str], line_number: int) -> Emit:
        slot, rule = match[2], match[3]
        self._references.append((line_number, rule, ""))
        if match[4] is None:
            return lambda state: state.pieces.append(self._remember(slot, rule, state))
        part = _PARTS[match[4]]
        return lambda state: state.pieces.append(part(self._remember(slot, rule, state)))


def _read_rules(text: str) -> dict[str, list[tuple[int, int, str]]]:
    """Rule -> its alternatives, each as (line number, weight, text)."""
    rules: dict[str, list[tuple[int, int, str]]] = {}
    lines: list[tuple[int, int, str]] | None = None
    for line_number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("  "):
            if lines is None:
                raise GrammarError(f"line {line_number}: an alternative stands before the first rule")
            weight = _WEIGHT.match(line.strip())
            body = line.strip()[weight.end() if weight else 0 :]
            lines.append((line_number, int(weight[1]) if weight else 1, body))
            continue
        match = _RULE_LINE.fullmatch(line.rstrip())
        if match is None:
            raise GrammarError(f"line {line_number}: {line!r} is neither 'rule:' nor an indented alternative")
        if match[1] in rules:
            raise GrammarError(f"line {line_number}: the rule '{match[1]}' is defined twice")
        lines = rules[match[1]] = []
    for rule, alternatives in rules.items():
        if not alternatives:
            raise GrammarError(f"the rule '{rule}' has no alternative")
    return rules


def _literal(text: str) -> Emit:
    return lambda state: state.pieces.append(text)


def _sequence(emits: Sequence[Emit]) -> Emit:
    if len(emits) == 1:
        return emits[0]

    def emit_all(state: _State) -> None:
        for emit in emits:
            emit(state)

    return emit_all


def _choice(emits: Sequence[Emit]) -> Emit:
    if len(emits) == 1:
        return emits[0]
    return lambda state: emits[int(state.draw() * len(emits))](state)


def _capital(emit: Emit) -> Emit:
    def emit_capital(state: _State) -> None:
        start = len(state.pieces)
        emit(state)
        text = state.take_from(start)
        state.pieces.append(text[:1].upper() + text[1:])

    return emit_capital


def _tidy(text: str) -> str:
    """Settles the articles and removes the spaces that choices without a text left behind."""
    if "~" in text:
        text = _ARTICLE.sub(_settle_article, text)
    text = _SPACES.sub(" ", text)
    return _SPACE_AFTER_BREAK.sub("", _SPACE_BEFORE_BREAK.sub("", text)).strip(" ")


def _settle_article(match: re.Match[str]) -> str:
    vowel = (match[3] or "x").lower() in "aeiou"
    return match[1] + ("n" if vowel else "") + match[2]
