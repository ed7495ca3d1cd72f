"""Route methods, which keep bricks apart and choose among them for each prompt: one file per method. Folders hold what they share."""
