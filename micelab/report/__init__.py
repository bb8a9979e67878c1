"""Networks compared and explained: the rows of a comparison, as tables in a terminal and as an HTML page."""
