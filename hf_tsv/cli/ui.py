"""`hf-tsv ui`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

from hf_tsv.cli import options
from hf_tsv.cli.groups import Only
from hf_tsv.system.errors import OutputError

USAGE = ("[OPTIONS]",)
MISSING = ""
EXAMPLES = ("hf-tsv ui", "hf-tsv ui --port 8000 --max-memory 8GB")


def ui(
    *,
    port: Annotated[
        int | None, options.RUN, "N", "Port on this machine. [default: the first free from 7860]"
    ] = None,
    compute: Annotated[options.ComputeOptions, Only("max_memory")],
    access: Annotated[options.AccessOptions, Only("stream")],
) -> None:
    """Find, merge, try and push models on a page in the browser.

    The page is served to this machine alone, and works with the account of `hf auth login`. Ctrl-C
    ends it and removes what was not pushed.
    """
    if find_spec("gradio") is None:
        raise OutputError("The page needs gradio.", 'Install it: pip install "hf-tsv[ui]".')
    from hf_tsv.ui import serving

    serving.serve(port, max_memory=compute.max_memory, stream=access.stream)
