"""From an image file to a guest that is ready to run: one module a boot protocol, image.py recognises which."""
