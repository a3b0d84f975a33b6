"""The documentation site: ``make docs`` builds it into build/docs, without a network, and takes warnings for errors."""

import importlib
import inspect
import pkgutil
import sys
from pathlib import Path

import talib_fast
from talib_fast.version import __version__ as release

sys.path.insert(0, str(Path(__file__).parent))
project, author, copyright = "talib_fast", "The talib_fast authors", "The talib_fast authors"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "repository_pages",
]
exclude_patterns = ["example"]
templates_path = ["_templates"]

# ---- Pages: Markdown as GitHub shows it

myst_heading_anchors = 6  # links to page.md#heading
myst_enable_extensions = ["html_image"]
highlight_language = "bash"  # of blocks without a language
copybutton_exclude = ".linenos, .gp, .go"  # of examples copy what is typed

# ---- API: a page for every module with an __all__, with every name that it lists and this package defines


def kind(value: object) -> str:
    """What autodoc calls it."""
    if inspect.isclass(value):
        return "exception" if issubclass(value, BaseException) else "class"
    return "function" if inspect.isfunction(value) else "data"


def public_names() -> dict[str, dict[str, str]]:
    """By module, the names of classes, functions and constants with the kind of each."""
    found: dict[str, dict[str, str]] = {}
    packages = pkgutil.walk_packages(talib_fast.__path__, "talib_fast.")
    for name in ["talib_fast", *(package.name for package in packages)]:
        if name.endswith(("__main__", "._C", "._autograd")):
            continue
        module = importlib.import_module(name)
        values = {key: getattr(module, key) for key in getattr(module, "__all__", ()) if not key.startswith("_")}
        names = {
            key: kind(value)
            for key, value in values.items()
            if getattr(value, "__module__", name).startswith("talib_fast") and not inspect.ismodule(value)
        }
        if names:
            found[name] = names
    return found


autosummary_context = {"public_names": public_names()}
add_module_names = False  # the page's title has it
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # nn.Module's are not about these classes
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_use_ivar = True
napoleon_custom_sections = [("Inputs", "params_style")]
doctest_global_setup = "import torch\ntorch.manual_seed(0)"

# ---- References: those into other projects would take their inventories from the network
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(torch|numpy|np|PIL|timm|collections|os|pathlib|pickle|typing)(\..*)?")]
nitpick_ignore = [("py:class", "ImageLike")]  # an alias

# ---- Looks

html_theme = "furo"
html_title = f"talib_fast {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
