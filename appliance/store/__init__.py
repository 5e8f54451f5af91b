"""The store: database, encrypted files, job queue, planning, accounts and the queries of the pages."""
