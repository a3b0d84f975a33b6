"""Names of modules and parameters without what wraps them."""

# what torch.compile, checkpoint_wrapper, (Distributed)DataParallel and FSDP put into the names of what they wrap
_WRAPPERS = frozenset(("_orig_mod", "_checkpoint_wrapped_module", "module", "_fsdp_wrapped_module"))


def plain_name(name: str) -> str:
    """``name`` without the parts that wrappers add to it, wherever they stand."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)
