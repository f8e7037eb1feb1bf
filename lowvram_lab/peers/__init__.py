"""Chapter 07, our engine beside other people's. Knows no chat."""
