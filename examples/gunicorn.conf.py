"""backfeedr under gunicorn: two processes that share one database.

    pip install gunicorn
    gunicorn -c examples/gunicorn.conf.py

The same without this file: `gunicorn --preload --workers 2 'backfeedr:Backfeedr()'`.
"""

# The app is made once, then forked: a first start prints its key once, and a wrong setting ends it.
preload_app = True
# It reads the BACKFEEDR_* variables except host, port and threads, which are set here.
wsgi_app = "backfeedr:Backfeedr()"
bind = "127.0.0.1:8080"
# Each process counts requests for itself: BACKFEEDR_RATE_LIMIT applies to each of them.
workers = 2
# No address is logged. gunicorn's warnings about malformed requests name the client, and so would an access log.
# At this level starts and stops are not logged, errors are.
loglevel = "error"
accesslog = None
# For each process. Reports that arrive together share a commit, so many threads cost little.
threads = 16
