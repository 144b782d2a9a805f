"""Let remote code written for transformers 4 load on transformers 5; names are only added, never changed."""

from __future__ import annotations

from typing import Any


def prepare(model: str, config: Any, auto_class: str, keys: dict[str, Any]) -> None:
    """Add what older remote code expects, before its weights are read. Does nothing for models of transformers.

    Args:
        model: Hub id or folder.
        config: Its configuration, completed in place.
        auto_class: Key of the model's class in `config.auto_map`.
        keys: Revision and trust, as given to `from_pretrained`.
    """
    remote = getattr(config, "auto_map", None) or {}
    if auto_class not in remote or not keys.get("trust_remote_code"):
        return
    for name, value in (("use_cache", False), ("pad_token_id", None), ("tie_word_embeddings", False)):
        if not hasattr(config, name):
            setattr(config, name, value)
    if getattr(config, "init_device", None) is not None:
        config.init_device = "cpu"  # LLaDA would build itself on a GPU
    _default_rope()
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    cls = get_class_from_dynamic_module(remote[auto_class], model, revision=keys.get("revision"))
    if not hasattr(cls, "all_tied_weights_keys"):
        cls.all_tied_weights_keys = {}
    own = cls.__dict__.get("tie_weights")
    if own is not None and not getattr(own, "_takes_any", False):

        def tie_weights(self: Any, *args: Any, **kwargs: Any) -> None:
            own(self)

        tie_weights._takes_any = True
        cls.tie_weights = tie_weights


def _default_rope() -> None:
    """Register the plain rotary embedding, which transformers 5 dropped from its table."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    def plain(config: Any, device: Any = None, seq_len: int | None = None, **kwargs: Any) -> tuple[torch.Tensor, float]:
        base = getattr(config, "rope_theta", None) or (getattr(config, "rope_parameters", None) or {}).get(
            "rope_theta", 1e4
        )
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dim = int(head * getattr(config, "partial_rotary_factor", 1.0))
        steps = torch.arange(0, dim, 2, dtype=torch.int64).to(device=device, dtype=torch.float) / dim
        return 1.0 / base**steps, 1.0

    ROPE_INIT_FUNCTIONS.setdefault("default", plain)
