"""Text in and out: tokens, chat templates, what an answer consists of, grammars."""
