"""What the report says, section by section, as text and in order. Markdown and the HTML page only lay it out."""
