"""Configuration of the documentation site: `make docs` builds it into docs/_build/html."""

import os
import runpy
import sys
from pathlib import Path

_DOCS = Path(__file__).parent
sys.path.insert(0, str(_DOCS / "_ext"))

project = "perf_vit"
author = "The perf_vit authors"
copyright = "The perf_vit authors, Apache-2.0"  # noqa: A001
version = release = runpy.run_path(str(_DOCS.parent / "perf_vit" / "_version.py"))["__version__"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "generated",
    "repository_links",
]
# The text of a notebook with stored outputs, which tools/store_notebook.py writes beside it.
_STORED = "tutorials/linearize_dinov2"
exclude_patterns = ["_build", "**/.ipynb_checkpoints", f"{_STORED}.md"]
# Most blocks without a language are commands and their output.
highlight_language = "text"
# `name` in docstrings is code.
default_role = "literal"

myst_enable_extensions = ["colon_fence", "deflist"]
# Links to headings work as they do on GitHub.
myst_heading_anchors = 4

# A notebook runs again when its code changes; DOCS_EXECUTE=off shows the others without outputs.
nb_execution_mode = os.environ.get("DOCS_EXECUTE", "cache")
nb_execution_excludepatterns = [f"{_STORED}.ipynb"]
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 900
nb_merge_streams = True
# Warnings of libraries.
nb_output_stderr = "remove"

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
# The list of a page names methods without their class.
toc_object_entries_show_parents = "hide"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "pydata_sphinx_theme"
html_title = "perf_vit"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/logo.svg"
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": "perf_vit", "image_light": "_static/logo.svg", "image_dark": "_static/logo.svg", "alt_text": ""},
    "github_url": "https://github.com/perf-vit/perf_vit",
    "header_links_before_dropdown": 6,
    "navbar_align": "left",
    "show_toc_level": 2,
    "search_bar_text": "Search the documentation",
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_context = {"default_mode": "auto"}

copybutton_exclude = ".linenos, .gp, .go"
