"""The models folder: find bundles, check and read them."""
