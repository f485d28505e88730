"""How Sphinx builds the site: `sphinx-build -W docs docs/_build`. What is made of the code is in `_site`."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "src")]

from ddvi import __version__  # noqa: E402

project = "ddvi"
author = "The ddvi developers"
copyright = "the ddvi developers; MIT licence"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_gallery.gen_gallery", "_site"]
exclude_patterns = ["_build", "_site", "tutorials"]

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 90
add_module_names = False
toc_object_entries = False

# Tutorials are run, and one that fails stops the build. One that hasn't changed isn't run again, unless
# -D sphinx_gallery_conf.run_stale_examples=True says so.
sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "gallery",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "capture_repr": (),
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
}

html_theme = "furo"
html_title = "ddvi"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#2a5d9f", "color-brand-content": "#2a5d9f"},
    "dark_css_variables": {"color-brand-primary": "#8ab4f0", "color-brand-content": "#8ab4f0"},
}
pygments_style = "friendly"
pygments_dark_style = "github-dark"
