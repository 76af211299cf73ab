"""The OpenAI-compatible server: ``app.create_app`` makes it; ``gemloom serve`` runs it."""
