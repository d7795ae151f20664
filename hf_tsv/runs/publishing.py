"""Published form of a folder: its card names the repository, and nothing names local folders."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_tsv.checkpoints.names import CONFIGS, RECIPE_FILE, RECONSTRUCTION_FILE, REPORT_FILE
from hf_tsv.system.progress import logger
from hf_tsv.system.untrusted import MAX_BYTES

CARD = "README.md"
SHOWN = ("base_model", "license")
JSON_FILES = {*CONFIGS, RECONSTRUCTION_FILE, REPORT_FILE}

THIS_FOLDER = '  # "." is this folder'
"""End of every line of a card's code that loads from the folder the card is in."""

LOADING = re.compile(rf"^(.*){re.escape(THIS_FOLDER)}(?=\r?$)", re.MULTILINE)
PLACE = re.compile(r'(local-dir:|(?<=["\s]))\.(?=["\s/]|$)')
LOCAL = re.compile(r"(?:~|\.{1,2})?/|~$")
ABSOLUTE = re.compile(
    r"(?<![\w./:<~)\]}-])(?<!\]\()(?:~|(?:/[^\s/'\"`<>|:;,()\[\]]+))(?:/[^\s/'\"`<>|:;,()\[\]]+)+"
)


def named(card: str, repo_id: str) -> str:
    """Card of a folder as the card of a repository; only lines that end in the note change.

    Example:
        >>> named('model = load(".")  # "." is this folder', "me/clip")
        'model = load("me/clip")'
    """

    def of_repo(line: re.Match[str]) -> str:
        return PLACE.sub(lambda at: ("hf-hub:" if at[1] else "") + repo_id, line[1])

    return LOADING.sub(of_repo, card)


def without_paths(content: Any) -> Any:
    """Copy of JSON in which the folders of this machine are names only.

    Example:
        >>> without_paths({"ref": "/home/me/clip-a", "revision": None, "file": "./a/b"})
        {'ref': 'clip-a', 'revision': None, 'file': 'b'}
    """
    if isinstance(content, list):
        return [without_paths(item) for item in content]
    if isinstance(content, dict):
        public = {key: without_paths(value) for key, value in content.items()}
        if isinstance(ref := public.get("ref"), str) and public.get("revision", "") is None:
            public["ref"] = Path(ref).name
        return public
    if isinstance(content, str) and "\n" not in content and LOCAL.match(content):
        return Path(content).name or content
    return content


def _tell_missing(card: str) -> None:
    """Tell which lines the metadata of a card lack that the Hub's model page is made from."""
    metadata = card.partition("---\n")[2].partition("\n---")[0] if card.startswith("---") else ""
    lacking = [key for key in SHOWN if not re.search(rf"(?m)^{key}:", metadata)]
    if lacking:
        names, them = " and no ".join(lacking), "it" if len(lacking) == 1 else "them"
        logger.info("The card has no %s: add %s to the lines at the top of %s.", names, them, CARD)


def published(files: Mapping[str, Path], repo_id: str) -> dict[str, bytes]:
    """Content of the files that are uploaded otherwise than they are in their folder, by name.

    The card gets the name of the repository. Descriptions lose the paths of local folders, which
    they need here to be found again. Where a path is left, as in files of earlier versions or in
    what the user wrote, a warning names the file. A note says what the card's metadata lack, as
    after a merge of local folders.
    """
    changed: dict[str, bytes] = {}
    if CARD not in files:
        logger.warning("The folder has no %s, so %s gets no model card.", CARD, repo_id)
    for name, path in files.items():
        json_file = path.name in JSON_FILES
        if (not json_file and name not in (CARD, RECIPE_FILE)) or path.stat().st_size > MAX_BYTES:
            continue
        content = path.read_bytes()
        try:
            text = content.decode()
            public = text
            if name == CARD:
                public = named(text, repo_id)
                _tell_missing(text)
            if json_file and (clean := without_paths(loaded := json.loads(text))) != loaded:
                public = json.dumps(clean, indent=2, ensure_ascii=False) + "\n"
        except ValueError:  # damaged, as is said where it is read
            continue
        if public != text:
            changed[name] = public.encode()
        if found := ABSOLUTE.search(public):
            said = "%s names a folder of this machine: %s. Everybody who sees %s can read it."
            logger.warning(said, path, found[0], repo_id)
    return changed
