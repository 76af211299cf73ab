"""How clients speak: for each dialect what it asks, what that means here, and how it is answered.

Pure, no HTTP: the routes are in ``dialect_routes.py``, ``openai_routes.py`` and
``llamacpp_routes.py``.
"""
