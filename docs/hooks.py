"""Pages of the documentation that are made when it is built (mkdocs calls `on_…`).

The command-line reference comes from the commands, the list of errors from the source, and the home
page, the guide for contributors and the changelog from the files at the root of the repository.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the commands of this checkout

ROOT_PAGES = {
    "index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md",
}  # fmt: skip
"""Pages that are files at the root, whose links are turned towards `docs/`."""

HOLE = "…"
"""Stand-in for what a message fills in."""


def repository() -> str:
    """Address of the repository, which only `pyproject.toml` knows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return str(project["urls"]["Repository"])


# Files at the root


def root_page(file: str) -> str:
    """A file at the root as a page, with links relative to `docs/`, or to the repository."""
    pages = {there: page for page, there in ROOT_PAGES.items()}

    def turned(found: re.Match[str]) -> str:
        target = found[2]
        if target.startswith("docs/"):
            target = target.removeprefix("docs/")
        elif target.partition("#")[0] in pages:
            path, hash_, anchor = target.partition("#")
            target = pages[path] + hash_ + anchor
        elif not re.match(r"https?:|#|mailto:", target):
            target = f"{repository()}/blob/main/{target}"
        return found[1] + target + found[3]

    text = (ROOT / file).read_text("utf-8")
    text = re.sub(r"(\]\()([^)\s]+)(\))", turned, text)
    return re.sub(r'((?:src|srcset|href)=")([^"]+)(")', turned, text)


# The command line


def cli_page() -> str:
    """Every command with its arguments and options, as `--help` groups them."""
    from hf_tsv import cli

    lines = [
        "# Command-line reference",
        "",
        "Generated from the commands of the version that these pages describe."
        " `hf-tsv COMMAND --help` prints the same. Exit codes and environment variables are on"
        " [a page of their own](environment.md).",
        "",
    ]
    for name in cli.COMMANDS:
        lines += _command_section(name, cli._command(name))
    return "\n".join(lines) + "\n"


def _command_section(name: str, command: Any) -> Iterator[str]:
    from hf_tsv.cli.help import described, named

    context = command.make_context(name, [], resilient_parsing=True)
    yield f"## hf-tsv {name} {{#{name}}}\n"
    yield cleandoc(command.help or "") + "\n"
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"```text\nhf-tsv {name} {usage}\n```\n"
    sections: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        panel = getattr(parameter, "rich_help_panel", None)
        title = panel if isinstance(panel, str) else (list(sections) or ["Options"])[-1]
        if parameter.param_type_name == "argument":
            title = "Arguments"
        elif title == "Arguments":
            title = "Options"
        sections.setdefault(title, []).append((named(parameter), described(parameter)))
    sections |= {
        title: list(rows.items()) for title, rows in getattr(command, "tables", {}).items()
    }
    for title, rows in sections.items():
        yield f"**{title}**\n"
        yield "| | |\n|---|---|"
        for names, text in rows:
            cell = re.sub(r"\[(?=default|required)", r"\\[", " ".join(text.split()))
            yield f"| `{names}` | {cell.replace('|', '&#124;')} |"
        yield ""
    yield "**Examples**\n"
    yield "```bash\n" + "\n".join(getattr(command, "examples", ())) + "\n```\n"


# The Python interface


def api_page() -> str:
    """Every public name, whose docstring mkdocstrings puts in its place."""
    import hf_tsv

    groups: dict[str, list[str]] = {
        title: [] for title in ("Verbs", "Models", "Choices", "Reports", "Errors")
    }
    for module, names in hf_tsv._PUBLIC.items():
        for name in names:
            if name.startswith("_"):
                continue
            if name.endswith("Report"):
                title = "Reports"
            elif name.endswith("Error"):
                title = "Errors"
            elif module.startswith("recipes"):
                title = "Choices"
            elif module.startswith("models") or not name.islower():
                title = "Models"
            else:
                title = "Verbs" if module.startswith("verbs") else "Choices"
            groups[title].append(name)
    verbs = {name: place for place, name in enumerate(("merge", "tune", "compress"))}
    groups["Verbs"].sort(key=lambda name: verbs.get(name, len(verbs)))
    lines = [
        "# Python reference",
        "",
        "Everything public is imported from `hf_tsv`. Importing the package is cheap: each name is"
        " loaded when it is first used. Arguments have the names of the command line's options:"
        " `--out-format` is `out_format=`, `--force` is `force=True`.",
        "",
    ]
    for title, names in groups.items():
        lines += [f"## {title}", "", *(f"::: hf_tsv.{name}\n" for name in names)]
    return "\n".join(lines)


# Errors


@dataclass(frozen=True)
class Raised:
    """Errors that one statement can raise."""

    kind: str
    file: str
    line: int
    message: str
    hint: str


def errors_raised() -> list[Raised]:
    """Every known error that the source makes, with its texts; empty where they are computed."""
    found = []
    kinds = error_kinds()
    for path in sorted((ROOT / "hf_tsv").rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        for function in [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))]:
            for call in _calls_of(function, kinds):
                message, hint = (_text(call, place, function) for place in (0, 1))
                name = call.func.id  # type: ignore[attr-defined]
                file = path.relative_to(ROOT).as_posix()
                found.append(Raised(name, file, call.lineno, message, hint))
        found += _explanations(tree, path.relative_to(ROOT).as_posix())
    unique = {(r.file, r.line): r for r in found}
    return list(unique.values())


def _explanations(tree: ast.Module, file: str) -> Iterator[Raised]:
    """Texts `said` and `hint` of the Hub client's errors, case by case."""
    for case in (node for node in ast.walk(tree) if isinstance(node, ast.match_case)):
        texts: dict[str, str] = {}
        for node in case.body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", 0)
            value: Any = getattr(node, "value", None)
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=True))
            for name, text in pairs:
                if isinstance(name, ast.Name):
                    before = texts.get(name.id, "") if isinstance(node, ast.AugAssign) else ""
                    texts[name.id] = before + _filled(text, case, node.lineno)
        if texts.keys() >= {"said", "hint"}:
            yield Raised("RepoError", file, case.body[0].lineno, texts["said"], texts["hint"])


def error_kinds() -> dict[str, str]:
    """Classes of errors with the first line of their docstrings, the general one first."""
    tree = ast.parse((ROOT / "hf_tsv/system/errors.py").read_text("utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {node.name: (ast.get_docstring(node) or "").split("\n")[0] for node in classes}


def _calls_of(function: ast.AST, kinds: dict[str, str]) -> Iterator[ast.Call]:
    """Calls of error classes, in order of the source, not those of nested functions."""
    for node in ast.iter_child_nodes(function):
        if isinstance(node, ast.FunctionDef):
            continue
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds:
            yield node
        yield from _calls_of(node, kinds)


def _text(call: ast.Call, place: int, function: ast.AST) -> str:
    """An argument as text with holes; a name stands for what the function assigned to it last."""
    if place >= len(call.args):
        return ""
    return _filled(call.args[place], function, call.lineno)


def _filled(value: ast.expr, function: ast.AST, line: int) -> str:
    match value:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_filled(part, function, line) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _filled(left, function, line) + _filled(right, function, line)
        case ast.IfExp(body=body, orelse=other):
            texts = [t for t in (_filled(part, function, line) for part in (body, other)) if t]
            return " / ".join(texts) if all(len(t) > 12 for t in texts) else HOLE
        case ast.Name(id=name):
            last = ""
            for node in ast.walk(function):
                if not isinstance(node, ast.Assign) or node.lineno >= line:
                    continue
                if any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                    last = _filled(node.value, function, node.lineno)
            return last
        case ast.FormattedValue():
            return HOLE
        case _:
            return ""


def errors_page() -> str:
    """All error messages with what to do, by kind, each with an anchor."""
    lines = [
        "# All error messages",
        "",
        f"Generated from the source. “{HOLE}” stands for a name or a number. Search this page for"
        " the fixed part of a message; [Troubleshooting](troubleshooting.md) explains the frequent"
        " ones."
        " In Python a message names arguments (`force=True`), on the command line options"
        " (`--force`).",
        "",
    ]
    by_kind: dict[str, list[Raised]] = defaultdict(list)
    for raised in errors_raised():
        if len(raised.message.replace(HOLE, "").strip()) > 8:
            by_kind[raised.kind].append(raised)
    kinds, taken = error_kinds(), set[str]()
    for kind in kinds:
        if kind not in by_kind:
            continue
        lines += [f"## {kind} {{#{kind.lower()}}}", "", kinds[kind], ""]
        for raised in sorted(by_kind[kind], key=lambda r: r.message.lstrip(f"{HOLE} ").lower()):
            anchor = slug(raised.message)
            if anchor in taken:
                continue
            taken.add(anchor)
            message, hint = (_escaped(text) for text in (raised.message, raised.hint))
            lines += [f'<a id="{anchor}"></a>**{message}**', ""]
            lines += [f": {hint}" if hint else ": (The message says all there is to do.)", ""]
    return "\n".join(lines)


def slug(message: str) -> str:
    """Anchor of a message: its first words."""
    words = re.findall(r"[a-z0-9]+", message.lower())
    return "-".join(words[:9])


def _escaped(text: str) -> str:
    """A message as Markdown; what is code in it stays as it is."""

    def escaped(found: re.Match[str]) -> str:
        return found[0] if found[0][0] == "`" else f"\\{found[0]}"

    return re.sub(r"`[^`]*`|[*_<>|\[\]`]", escaped, " ".join(text.split()))


# What mkdocs calls


def on_config(config: Any) -> Any:
    """Take the address of the repository from `pyproject.toml`."""
    config.repo_url = repository()
    config.repo_name = "hf-tsv"
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    pages = {page: root_page(file) for page, file in ROOT_PAGES.items()}
    pages |= {"cli.md": cli_page(), "api.md": api_page(), "errors.md": errors_page()}
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Links where docstrings have names in brackets, [`Name`], and types without their Markdown."""
    if page.file.src_uri != "api.md":
        return html
    known = set(re.findall(r'id="hf_tsv\.(\w+)"', html))

    def linked(found: re.Match[str]) -> str:
        name = found[1]
        code = f"<code>{name}</code>"
        return f'<a href="#hf_tsv.{name}">{code}</a>' if name in known else code

    html = re.sub(r"\[<code>(\w+)</code>\]", linked, html)
    # Types in docstrings are Markdown; mkdocstrings shows them as code.
    return re.sub(r"<code>[^<]*`[^<]*</code>", lambda m: re.sub(r"[`*]", "", m[0]), html)
