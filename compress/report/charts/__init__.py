"""The drawings of the report, as inline SVG.

One drawing per panel, so that a page sets them side by side where there is room and one above the other on a phone.
Colours are the page's own: `currentColor` and its custom properties, so that both themes are readable.
"""
