"""The generated world of the demo: a fictional shop, its support desk, and the text the demo base is trained on."""
