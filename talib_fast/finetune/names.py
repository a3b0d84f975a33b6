"""Names of a model's parts without what wrappers add to them."""


def plain_name(name: str) -> str:
    """``name`` without what a user's modules may be called as well: any ``module``, as further wrappers call what they
    hold, and what PEFT puts into the names of a layer that it adapts, or of one that it trains a copy of."""
    parts = name.split(".")
    return ".".join(
        part
        for j, part in enumerate(parts)
        if part not in ("module", "base_layer", "modules_to_save") and (j == 0 or parts[j - 1] != "modules_to_save")
    )
