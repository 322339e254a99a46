"""The playground page; `service/http/routes/page.py` serves it."""
