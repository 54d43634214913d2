"""backfeedr under gunicorn: two processes that share one database.

    pip install gunicorn
    gunicorn -c examples/gunicorn.conf.py

The same without this file: `gunicorn --preload --workers 2 'backfeedr:Backfeedr()'`.
"""

# The app is made once and then forked: a first start prints its key once, and an invalid setting stops the start.
preload_app = True
# It reads the BACKFEEDR_* variables, but host, port, threads and logs are set here.
wsgi_app = "backfeedr:Backfeedr()"
bind = "127.0.0.1:8080"
# Each process counts requests for itself: BACKFEEDR_RATE_LIMIT applies to each of them.
workers = 2
# No client address is logged: gunicorn's warnings about malformed requests name the client, and so would an access
# log. At this level, errors are logged, but not starts and stops.
loglevel = "error"
accesslog = None
# Per process. Reports that arrive together share a commit, so many threads cost little.
threads = 16
