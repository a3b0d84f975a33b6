"""A helper for tests of torch's private parts."""


class Lacking:
    """A view of a module that lacks one name; ``path`` is that name, dotted if it is inside an attribute."""

    def __init__(self, module, path):
        self._module, (self._name, _, self._path) = module, path.partition(".")

    def __getattr__(self, name):
        if name != self._name:
            return getattr(self._module, name)
        if not self._path:
            raise AttributeError(name)
        return Lacking(getattr(self._module, name), self._path)
