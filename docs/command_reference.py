"""Write docs/reference/commands.md, the reference of all commands, from their parsers: ``python docs/command_reference.py``."""

import argparse
import importlib
import re
from pathlib import Path
from unittest.mock import patch

DOCS = Path(__file__).parent
PAGE = DOCS / "reference" / "commands.md"
INTRODUCTION = """# Commands

`python docs/command_reference.py` writes this page from the commands themselves. Each command prints the same with `-h`.
nnU-Net's own commands are described in [nnU-Net's documentation](https://github.com/MIC-DKFZ/nnUNet/tree/master/documentation)."""


class _ParserFoundError(Exception):
    """A command has built its parser and would now read its arguments."""


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command of ``setup.cfg`` by the command's name."""
    lines = re.findall(
        r"(nnUNetv2_\w+) = (nnunetv2_macl\.cli\.\w+):(\w+)", (DOCS.parent / "setup.cfg").read_text(encoding="utf-8")
    )
    return {name: _parser(getattr(importlib.import_module(module), entry)) for name, module, entry in lines}


def _parser(entry) -> argparse.ArgumentParser:
    def stop(parser, *arguments):
        raise _ParserFoundError(parser)

    # A command builds its parser inside its entry point, so the entry point runs until it reads its arguments.
    with patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            entry()
        except _ParserFoundError as found:
            return found.args[0]
    raise AssertionError(f"{entry} reads no arguments")


def pages() -> dict[Path, str]:
    """Return the text of the page by its file."""
    return {PAGE: "\n\n".join([INTRODUCTION, *(_section(parser) for parser in parsers().values())]) + "\n"}


def _section(parser: argparse.ArgumentParser) -> str:
    parts = [f"## `{parser.prog}`", parser.description or ""]
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    if actions:
        rows = [f"| {_usage(action)} | {_escaped((action.help or '') % vars(action))} |" for action in actions]
        parts.append("\n".join(["| argument | meaning |", "|---|---|", *rows]))
    parts.append((parser.epilog or "").replace(", then ", ", then\n"))
    return "\n\n".join(part for part in parts if part)


def _usage(action: argparse.Action) -> str:
    if action.choices:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    else:
        value = action.metavar or (action.dest if not action.option_strings else action.dest.upper())
    value = {0: "", "?": f"[{value}]", "+": f"{value} ...", "*": f"[{value} ...]"}.get(action.nargs, value)
    names = action.option_strings or [""]
    return ", ".join(f"`{_escaped(f'{name} {value}'.strip())}`" for name in names)


def _escaped(text: str) -> str:
    return text.replace("|", r"\|")


if __name__ == "__main__":
    for file, text in pages().items():
        file.write_text(text, encoding="utf-8")
