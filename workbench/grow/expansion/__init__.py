"""Dense growth: new layers and wider ones, from names and shapes."""
