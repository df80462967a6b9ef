"""What a data set is like, in numbers: counted, as text, as a page."""
