"""A page as its elements, by Python's own parser: what is not closed is found."""

import html.parser

VOID = {'meta', 'br', 'input', 'path', 'link', 'img', 'hr', 'rect'}


class Page(html.parser.HTMLParser):
  """Elements in order, the texts in them, and what is not closed."""

  def __init__(self, text):
    super().__init__(convert_charrefs=True)
    self.open, self.elements, self.wrong = [], [], []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.elements.append([tag, dict(attrs), ''])
    if tag not in VOID:
      self.open.append(self.elements[-1])

  def handle_startendtag(self, tag, attrs):
    self.elements.append([tag, dict(attrs), ''])

  def handle_endtag(self, tag):
    if not self.open or self.open.pop()[0] != tag:
      self.wrong.append(tag)

  def handle_data(self, data):
    for element in self.open:
      element[2] += data

  def of(self, tag, **attributes):
    return [(found, text) for name, found, text in self.elements
            if name == tag and all(found.get(key.rstrip('_')) == value for key, value in attributes.items())]
