"""Sphinx extension: links from the pages to other files of the repository, which GitHub follows, work in the site, too.

Pages link to sources, folders and results by their paths. Sphinx knows documents alone, all below docs/. What else is
linked to gets a page of its own below files/: code is highlighted, Markdown rendered, a folder listed with its files.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from docutils import nodes
from markdown_it import MarkdownIt
from mdit_py_plugins.anchors import anchors_plugin
from pygments.lexers import find_lexer_class_for_filename
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.osutil import relative_uri

ROOT = Path(__file__).resolve().parent.parent
# the documents that show these files by an include
SHOWN_BY = {"README.md": "index", "CHANGELOG.md": "changelog", "SECURITY.md": "security"}
IMAGES = {".png", ".svg"}
UNSHOWN = {".so", ".gz"}

markdown = MarkdownIt("commonmark").enable("table").use(anchors_plugin, max_level=6)


def document(app: Sphinx, path: Path) -> str | None:
    """The document that has or shows a file, if there is one."""
    shown_by = SHOWN_BY.get(str(path.relative_to(ROOT)))
    found = shown_by or app.env.path2doc(path)
    return found if found in app.env.found_docs else None


def page(path: Path) -> str:
    """The page of a file without a document."""
    return f"files/{path.relative_to(ROOT)}"


def follow(app: Sphinx, node: nodes.Element) -> tuple[Path, str]:
    """The file, and the heading in it, that a link of MyST leads to."""
    if node.get("refdomain") == "doc":  # MyST found the file, and took .md off
        return Path(app.srcdir, f"{node['reftarget']}.md").resolve(), node["reftargetid"] or ""
    target, _, heading = node["reftarget"].partition("#")
    # relative to the file with the link, which a document may include
    return Path(node.source).parent.joinpath(unquote(target)).resolve(), heading


def link_to_files(app: Sphinx, doctree: nodes.document) -> None:
    """Turn MyST's links to what is no document into links to its page, and note that it needs one."""
    links = [*doctree.findall(addnodes.pending_xref), *doctree.findall(addnodes.download_reference)]
    for node in links:
        if node["reftype"] != "myst" or node.get("reftarget") in app.env.found_docs:
            continue
        path, heading = follow(app, node)
        if not path.exists() or not path.is_relative_to(ROOT) or path.suffix in IMAGES:
            continue  # MyST warns, or offers an image to download
        if found := document(app, path):
            new = addnodes.pending_xref(
                "", *node.children, refdomain="doc", reftype="myst", refexplicit=True,
                refdoc=app.env.docname, reftarget=found, reftargetid=heading,
            )  # fmt: skip
        else:
            app.env.linked_files.add(path)
            uri = app.builder.get_relative_uri(app.env.docname, page(path))
            new = nodes.reference("", "", *node.children, refuri=uri + (heading and f"#{heading}"), internal=True)
        node.replace_self(new)


def rendered(app: Sphinx, path: Path, queue: list[Path]) -> str:
    """Markdown as HTML, whose links to files lead to their pages."""
    here = app.builder.get_target_uri(page(path))
    tokens = markdown.parse(path.read_text())
    for token in chain.from_iterable(block.children or [] for block in tokens):
        href = str(token.attrs.get("href", ""))
        if href and "://" not in href and not href.startswith("#"):
            target, _, heading = href.partition("#")
            linked = path.parent.joinpath(unquote(target)).resolve()
            found = document(app, linked)
            if found is None:
                queue.append(linked)
            uri = relative_uri(here, app.builder.get_target_uri(found or page(linked)))
            token.attrs["href"] = uri + (heading and f"#{heading}")
    html = markdown.renderer.render(tokens, markdown.options, {})
    # as Furo has them, which scroll where the screen is narrow
    html = html.replace("<table>", '<div class="table-wrapper docutils container"><table class="docutils">')
    return html.replace("</table>", "</table></div>")


def listed(app: Sphinx, folder: Path, queue: list[Path]) -> str:
    """A folder's files as a list of links."""
    entries = [
        entry
        for entry in sorted(folder.iterdir())
        if entry.name != "__pycache__" and entry.suffix not in IMAGES | UNSHOWN
    ]
    queue += entries
    here = app.builder.get_target_uri(page(folder))
    links = "".join(
        f'<li><a href="{relative_uri(here, app.builder.get_target_uri(page(entry)))}">{entry.name}</a></li>'
        for entry in entries
    )
    return f"<ul>{links}</ul>"


def pages_of_files(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The pages of all files that documents link to, and of those that these pages link to."""
    queue, done = sorted(app.env.linked_files), set()
    for path in queue:
        if path in done:
            continue
        done.add(path)
        title = str(path.relative_to(ROOT))
        if path.is_dir():
            body = listed(app, path, queue)
        elif path.suffix == ".md":
            body = rendered(app, path, queue)
        else:
            lexer = find_lexer_class_for_filename(path.name)
            body = app.builder.highlighter.highlight_block(path.read_text(), lexer.aliases[0] if lexer else "text")
        yield page(path), {"title": title, "body": f"<h1>{title}</h1>{body}", "parents": []}, "page.html"


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("env-before-read-docs", lambda app, env, docnames: setattr(env, "linked_files", set()))
    app.connect("doctree-read", link_to_files, priority=100)  # before Sphinx copies what it takes for downloads
    app.connect("html-collect-pages", pages_of_files)
    return {"parallel_read_safe": False}
