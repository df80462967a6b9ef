"""Purchase histories: from review dumps, and as a data set."""
