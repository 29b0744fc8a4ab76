"""What ends a response of a model that a server has, from a copy of its folder: servers do not report it."""

import json
from pathlib import Path

from lopd.engines.inputs import stop_ids
from lopd.errors import EngineError, LopdError
from lopd.records.identity import TokenizerId
from lopd.records.manifest import SamplingParams
from lopd.records.paths import read_regular


def eos_ids(folder: Path, tokenizer: TokenizerId) -> frozenset[int]:
    """Return those of generation_config.json, or else config.json, in the folder or in that of the base model; and the tokenizer's.

    Raises:
        EngineError: they are those of a base model that is not on this machine.
    """
    from lopd.engines.finding import local_folder

    files, adapters = _settings(folder), folder / "adapter_config.json"
    if not files and adapters.exists():
        base = json.loads(read_regular(adapters)).get("base_model_name_or_path")
        try:
            files = _settings(local_folder(base, weights=False))
        except LopdError as error:
            raise EngineError(
                f"Model {str(folder)!r}: its adapters do not state what ends a response, and their base model {base!r:.80} is not here; pass "
                "`SamplingParams(stop_ids=...)`, or put the base's generation_config.json beside them."
            ) from error
    configured = next((ids for file in files if (ids := json.loads(read_regular(file)).get("eos_token_id")) is not None), None)
    return stop_ids(SamplingParams(), configured, tokenizer)


def _settings(folder: Path) -> list[Path]:
    return [folder / name for name in ("generation_config.json", "config.json") if (folder / name).exists()]
