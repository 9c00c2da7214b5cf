"""Reports of training runs as HTML: `page` and `charts` draw them, `files` writes them."""
