"""What Ray runs for studies: cell.py opens a cell, measures it and times it; the others measure in their own ways."""
