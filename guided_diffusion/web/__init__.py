"""A page in the browser. `translate` does the work without Gradio; `page`, which alone imports it, is the page."""
