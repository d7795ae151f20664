"""The page of `hf-tsv ui` as a picture: `python docs/page.py` writes `docs/ui.png`.

A browser finds, chooses and merges tiny models that the Hub of the tests serves under public names,
so sizes and seconds are those of tiny models.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT)]
SIZE = {"width": 900, "height": 1000}
BASE = "openai/clip-vit-base-patch32"
CHOSEN = ("sun397", "dtd", "svhn")


def main() -> None:
    """Merge in the browser, and take a picture of the page."""
    import public_names
    from home import HUB  # before anything imports huggingface_hub
    from pages import Window, chromium, served

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        public_names.serve(HUB, public_names.make(folder / "models"), folder / "work")
        with served(HUB.endpoint, folder / "server", space=False) as server, chromium() as browser:
            context = browser.new_context(viewport=SIZE)
            window = Window(context, server.address)
            window.write("base", BASE)
            window.write("author", "tanganke")
            window.press("find")
            window.said("found", holding="can be merged")
            window.tick(*(f"tanganke/clip-vit-base-patch32_{task}" for task in CHOSEN))
            window.press("merge")
            window.said("state", kind="done")
            window.page.evaluate("document.activeElement.blur()")
            window.page.screenshot(path=ROOT / "docs" / "ui.png", full_page=True)
            context.close()


if __name__ == "__main__":
    main()
