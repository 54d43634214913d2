"""backfeedr under gunicorn: two processes that share one database.

    pip install gunicorn
    gunicorn -c examples/gunicorn.conf.py

The command line of it is `gunicorn --preload --workers 2 'backfeedr:Backfeedr()'`.
"""

# Made once and then forked: a first start announces its key once, and a wrong setting ends it.
preload_app = True
# It reads the BACKFEEDR_* variables, but for host, port and threads: these are gunicorn's.
wsgi_app = "backfeedr:Backfeedr()"
bind = "127.0.0.1:8080"
# Each process counts requests by itself: BACKFEEDR_RATE_LIMIT holds for each of them.
workers = 2
# No address is logged: a warning of gunicorn names the client of a malformed request, and so would an access log.
# What starts and stops is not logged either; faults are.
loglevel = "error"
accesslog = None
# Of each process. Reports that come at one moment share a commit, so many threads cost little.
threads = 16
