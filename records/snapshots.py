"""What the text of a record's snapshot says. Nothing of it is run: it is a stranger's code."""

import ast
import functools
import io
import json
import re
import sys
import tokenize
import unicodedata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.common import UserError, read_contract, sha256  # noqa: E402
from eval_speedrun import CONTRACTS  # noqa: E402

FLAGS = (b"_inductor", b"TORCHINDUCTOR", b"max-autotune", b"coordinate_descent")
# The contract's section of the records of 2026-11-20, which was one text for all tracks.
FIRST_CONTRACT = "ddedf51b4feab0f345213192516f63a448cbac5b055147b2f0a559ed50c91f33"
FIRST_TITLE = "# Contract: do not edit for a record"
FIRST_DATE = "2026-11-20"  # of the last record that may have it
# What reaches for files, for the environment, for other modules, or for names that are made up.
WORDS = "environ getenv getattr setattr import exec eval compile globals vars builtins modules"
REACHING = re.compile(rf"\b(\w*open|{'|'.join(WORDS.split())})\b|__")
UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)  # of a text as Python

# ---------------------------------------------------------------------------------------------
# The contract
# ---------------------------------------------------------------------------------------------


@functools.lru_cache(8)  # a series has one source in all its logs
def syntax_tree(source: bytes) -> ast.Module:
    """Raises UserError where the text is no Python."""
    try:
        return ast.parse(source)
    except UNREADABLE as error:
        raise UserError(f"the snapshot is no Python ({type(error).__name__}: {error})")


def comments(source: bytes) -> list[str]:
    """The comments that stand alone on a line; [] where the text is no Python."""
    try:
        tokens = list(tokenize.tokenize(io.BytesIO(source).readline))
    except (tokenize.TokenError, *UNREADABLE):
        return []
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


def check_contract(source: bytes, track: str, date: str = FIRST_DATE) -> tuple:
    """The snapshot's contract is its track's published one, or the one of the first records.

    date: of the record. Its title stands there once: a second one is of a contract for show.
    """
    titles = source.count(b"# Contract:")
    if titles > 1:
        return False, f"contract: its title stands there {titles} times"
    rule = "# " + "-" * 93 + "\n"
    start = f"{rule}{FIRST_TITLE}\n{rule}".encode()
    section = source.partition(start)[2].partition(rule.encode())[0]
    if sha256(section) == FIRST_CONTRACT and date <= FIRST_DATE:
        shown = FIRST_TITLE not in comments(source)
        return not shown, f"contract: the first, of 2026-11-20{', in a string' * shown}"
    try:
        found = read_contract(source.decode(errors="replace"), track).sha256
    except (UserError, RecursionError) as error:
        return False, f"contract: {error}"
    if found == CONTRACTS.get(track):
        return True, "contract: as published"
    return False, f"contract: edited: {found} is not that of {track}"


# ---------------------------------------------------------------------------------------------
# Hyperparameters
# ---------------------------------------------------------------------------------------------


def config_call(tree: ast.Module, config: str) -> ast.Call | None:
    """The last call that is CONFIGS[config]: in the table, or assigned to its place."""
    found = None
    for node in tree.body:
        if not isinstance(node, ast.Assign):
            continue
        target = ast.unparse(node.targets[0])
        entries = {}
        if target == "CONFIGS" and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values):
                entries[key and ast.unparse(key)] = value
        elif target == f"CONFIGS[{config!r}]":
            entries[repr(config)] = node.value
        entry = entries.get(repr(config))
        if isinstance(entry, ast.Call):
            found = entry
    return found


def config_values(source: bytes, config: str) -> dict:
    """The literal values that the snapshot gives to CONFIGS[config], as JSON has them.

    Those of its call's keywords and, where it is a plain call of Config, of the class's defaults.
    Raises UserError where there is no such call.
    """
    tree = syntax_tree(source)
    call = config_call(tree, config)
    if call is None:
        raise UserError(f"CONFIGS has no call for {config!r}")
    nodes = {}
    plain = not call.args and all(keyword.arg for keyword in call.keywords)
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == ast.unparse(call.func) and plain:
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and field.value:
                    nodes[ast.unparse(field.target)] = field.value
    nodes |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    values = {}
    for name, node in nodes.items():
        try:
            values[name] = json.loads(json.dumps(ast.literal_eval(node)))
        except (TypeError, *UNREADABLE):
            continue  # computed when the script runs
    return values


def check_hyperparameters(logs: list) -> tuple:
    """The hyperparameters in each log are those that its own snapshot gives to its config."""
    faults = {}  # each once, in this order
    try:
        for log in logs:
            logged = json.loads(log["hyperparameters"])
            for name, value in config_values(log["source"], log["config"]).items():
                if logged.get(name) != value:
                    faults[f"{name} {logged.get(name)}, in the snapshot {value}"] = None
    except (UserError, RecursionError) as error:
        faults[str(error)] = None
    return not faults, f"hyperparameters: {'; '.join(faults) or 'those of the snapshot'}"


# ---------------------------------------------------------------------------------------------
# For the reviewer's eyes
# ---------------------------------------------------------------------------------------------


def reaching_lines(source: bytes, before: bytes) -> list[str]:
    """Lines with open, a word of WORDS or "__" that the predecessor lacks: "line 7: ...".

    Names are compared as Python reads them, which takes a full-width letter for a plain one.
    """
    known = {line.strip() for line in readable(before)}
    found = []
    for number, line in enumerate(readable(source), 1):
        if REACHING.search(line) and line.strip() not in known:
            found.append(f"line {number}: {line.strip()[:100]}")
    return found


def readable(source: bytes) -> list[str]:
    return unicodedata.normalize("NFKC", source.decode(errors="replace")).split("\n")
