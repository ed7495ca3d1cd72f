"""Advice on merging bricks: their overlaps, contradictions and barriers, and the merge that follows from them."""
