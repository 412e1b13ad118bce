"""Sphinx configuration: MyST pages, the API from docstrings, the command line from click."""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "_extensions")]

import mealv2  # noqa: E402  # needs the path

project = "mealv2"
author = "The mealv2 authors"
release = version = mealv2.__version__
html_title = "mealv2"
html_show_copyright = False
smartquotes = False  # `--flag` keeps its hyphens

extensions = [
    "myst_parser",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx_click",
    "plain_docstrings",
    "command_pages",
]
exclude_patterns = ["_build", "_extensions", "reference/api/modules.rst"]
nitpicky = True
# Inventories of other projects are not fetched, so their types stay text.
nitpick_ignore_regex = [("py:.*", ".*")]

myst_enable_extensions = ["attrs_block"]
myst_heading_anchors = 3

apidoc_modules = [
    {
        "path": "../mealv2",
        "destination": "reference/api",
        "separate_modules": True,
        "module_first": True,
        "max_depth": 3,
        "automodule_options": {"members", "show-inheritance"},
    }
]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # torch documents forward
default_role = "code"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
# An exported name is documented twice: in its package and in its module.
suppress_warnings = ["ref.python"]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
html_show_sphinx = False
