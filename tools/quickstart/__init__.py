"""The parts of the quickstart data builder: packages, classes, pictures and sample scenes."""
