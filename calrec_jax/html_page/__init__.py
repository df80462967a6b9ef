"""What HTML pages of this project share: the document and its style, tables, charts."""
