"""The playground page; `service/routes/page.py` serves it."""
