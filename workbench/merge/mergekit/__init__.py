"""The merge methods of mergekit, available as `merge: mergekit/NAME`."""
