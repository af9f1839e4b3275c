"""A verdict for people and machines: one HTML page, Markdown, JUnit XML, annotations."""
