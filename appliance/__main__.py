"""``python -m appliance``: the same as the console script."""

from appliance.cli.main import main

raise SystemExit(main())
