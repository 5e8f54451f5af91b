-- The box's database. Numbered migrations, append only: a block is never edited once it has shipped.
-- Each block runs in one transaction; PRAGMA user_version records the last one applied.

-- migration 1: images, models, jobs, findings, accounts, audit
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
INSERT INTO meta VALUES ('revision', '0');

CREATE TABLE studies (
  id INTEGER PRIMARY KEY,
  study_instance_uid TEXT NOT NULL,
  patient_key TEXT NOT NULL,          -- two patients under one UID stay two studies
  patient_id TEXT NOT NULL, patient_name TEXT NOT NULL, patient_birth_date TEXT NOT NULL, patient_sex TEXT NOT NULL,
  patient_age_years REAL,
  study_date TEXT NOT NULL, study_time TEXT NOT NULL, accession_number TEXT NOT NULL, study_description TEXT NOT NULL,
  received_at TEXT NOT NULL,
  patient_mismatch INTEGER NOT NULL DEFAULT 0,
  revision INTEGER NOT NULL,          -- increases with every change that a person can see
  UNIQUE (study_instance_uid, patient_key)
) STRICT;
CREATE INDEX studies_by_revision ON studies (revision);

CREATE TABLE series (
  id INTEGER PRIMARY KEY,
  study_id INTEGER NOT NULL REFERENCES studies (id),
  series_instance_uid TEXT NOT NULL,
  modality TEXT NOT NULL, series_description TEXT NOT NULL,
  last_received_at REAL NOT NULL,     -- seconds since the epoch, for the idle rule
  open INTEGER NOT NULL DEFAULT 1,
  UNIQUE (study_id, series_instance_uid)
) STRICT;
CREATE INDEX series_open ON series (last_received_at) WHERE open = 1;

CREATE TABLE instances (
  id INTEGER PRIMARY KEY,
  series_id INTEGER NOT NULL REFERENCES series (id),
  sop_instance_uid TEXT NOT NULL, sop_class_uid TEXT NOT NULL, transfer_syntax_uid TEXT NOT NULL,
  content_sha256 TEXT NOT NULL,       -- of transfer syntax and data set, without the file meta group
  bytes INTEGER NOT NULL,
  modality TEXT NOT NULL, body_part_examined TEXT NOT NULL, view_position TEXT NOT NULL,
  image_rows INTEGER NOT NULL, image_columns INTEGER NOT NULL, number_of_frames INTEGER NOT NULL,
  patient_age_years REAL,
  source_kind TEXT NOT NULL, source_actor TEXT NOT NULL,
  received_at TEXT NOT NULL,
  conflict INTEGER NOT NULL DEFAULT 0,
  state TEXT NOT NULL,
  reason TEXT,                        -- JSON note
  notes TEXT NOT NULL,                -- JSON notes of ingest
  ingest_ms REAL NOT NULL,
  UNIQUE (sop_instance_uid, content_sha256)
) STRICT;
CREATE INDEX instances_by_series ON instances (series_id);
CREATE INDEX instances_by_state ON instances (state);

CREATE TABLE models (
  digest TEXT PRIMARY KEY,
  name TEXT NOT NULL, version TEXT NOT NULL,
  directory TEXT NOT NULL,            -- relative to the data directory
  manifest TEXT NOT NULL,
  precision TEXT NOT NULL, runtime TEXT NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('active', 'previous', 'retired')),
  self_test TEXT NOT NULL,            -- JSON: the self-test report
  activated_at TEXT NOT NULL
) STRICT;
CREATE UNIQUE INDEX one_active_model_per_name ON models (name) WHERE state = 'active';

CREATE TABLE jobs (
  id INTEGER PRIMARY KEY,
  kind TEXT NOT NULL,
  instance_id INTEGER NOT NULL REFERENCES instances (id),
  model_digest TEXT NOT NULL,         -- '' for a check
  priority INTEGER NOT NULL DEFAULT 0,
  state TEXT NOT NULL,
  scope_code TEXT NOT NULL DEFAULT '',-- why no model applies
  attempts INTEGER NOT NULL DEFAULT 0,
  lease_owner TEXT NOT NULL DEFAULT '',
  lease_until REAL NOT NULL DEFAULT 0,
  claimed_at REAL NOT NULL DEFAULT 0,
  created_at TEXT NOT NULL, finished_at TEXT,
  outcome TEXT,                       -- the state of the image after this job
  reason TEXT, notes TEXT NOT NULL, timing_ms TEXT, runtime TEXT,
  UNIQUE (instance_id, kind, model_digest)
) STRICT;
CREATE INDEX jobs_queue ON jobs (priority DESC, id) WHERE state = 'queued';
CREATE INDEX jobs_running ON jobs (lease_until) WHERE state = 'running';

CREATE TABLE findings (
  id INTEGER PRIMARY KEY,
  job_id INTEGER NOT NULL REFERENCES jobs (id),
  instance_id INTEGER NOT NULL REFERENCES instances (id),
  label TEXT NOT NULL, code TEXT NOT NULL, title_zh TEXT NOT NULL, title_en TEXT NOT NULL,
  score REAL NOT NULL, threshold REAL NOT NULL, positive INTEGER NOT NULL,
  sensitivity TEXT NOT NULL, specificity TEXT NOT NULL, measured_on TEXT NOT NULL,
  model TEXT NOT NULL, model_version TEXT NOT NULL, model_digest TEXT NOT NULL,
  precision TEXT NOT NULL, runtime TEXT NOT NULL,
  peak TEXT, outline TEXT NOT NULL, heatmap_png BLOB NOT NULL,
  UNIQUE (job_id, label)
) STRICT;
CREATE INDEX findings_by_instance ON findings (instance_id);

CREATE TABLE rejections (
  id INTEGER PRIMARY KEY,
  at TEXT NOT NULL,
  source_kind TEXT NOT NULL, source_actor TEXT NOT NULL, name TEXT NOT NULL,
  bytes INTEGER NOT NULL, code TEXT NOT NULL, detail TEXT NOT NULL
) STRICT;

CREATE TABLE users (
  id INTEGER PRIMARY KEY,
  username TEXT NOT NULL UNIQUE COLLATE NOCASE,
  password_hash TEXT NOT NULL,
  role TEXT NOT NULL,
  must_change INTEGER NOT NULL,
  failures INTEGER NOT NULL DEFAULT 0,
  locked_until REAL NOT NULL DEFAULT 0,
  created_at TEXT NOT NULL
) STRICT;

CREATE TABLE sessions (
  token_sha256 TEXT PRIMARY KEY,
  user_id INTEGER NOT NULL REFERENCES users (id),
  created_at REAL NOT NULL,
  seen_at REAL NOT NULL
) STRICT;

CREATE TABLE audit (
  seq INTEGER PRIMARY KEY,
  entry TEXT NOT NULL,                -- canonical JSON
  digest TEXT NOT NULL                -- SHA-256 of the digest before it and this entry
) STRICT;
CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit BEGIN SELECT RAISE (ABORT, 'the audit is append-only'); END;
CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit BEGIN SELECT RAISE (ABORT, 'the audit is append-only'); END;

-- migration 2: activations and model lines
CREATE TABLE activations (            -- the journal of every model that was to be activated, and the history shown to people
  id INTEGER PRIMARY KEY,
  name TEXT NOT NULL, version TEXT NOT NULL, digest TEXT NOT NULL,
  device TEXT NOT NULL,               -- digest of the device profile: a failure belongs to one device
  source TEXT NOT NULL CHECK (source IN ('library', 'usb', 'hand', 'embedded')),
  origin TEXT NOT NULL,               -- the directory its files are copied from
  precision TEXT,                     -- the variant that a person chose; NULL: the most exact one
  purpose TEXT NOT NULL DEFAULT 'activate' CHECK (purpose IN ('activate', 'rollback')),
  state TEXT NOT NULL CHECK (state IN ('staged', 'building', 'self-test', 'trial', 'good', 'failed', 'rolled-back', 'withdrawn')),
  attempts INTEGER NOT NULL DEFAULT 0,-- starts of the self-test; on trial, starts of the worker since the last case: ends a crash loop
  progress REAL NOT NULL DEFAULT 0,   -- 0 to 1 within the state
  reason TEXT,                        -- JSON note: why it failed, was rolled back or withdrawn
  self_test TEXT,                     -- JSON: what was measured on this box
  trial TEXT,                         -- JSON: cases, failures, latency and drift so far
  marked INTEGER NOT NULL DEFAULT 1,  -- 0: findings of a version that was rolled back or withdrawn still wait for their note
  actor TEXT NOT NULL,
  started_at TEXT NOT NULL, updated_at TEXT NOT NULL, ended_at TEXT
) STRICT;
CREATE INDEX activations_by_digest ON activations (digest, device);
CREATE UNIQUE INDEX one_coming_model_per_name ON activations (name) WHERE state IN ('staged', 'building', 'self-test');
CREATE UNIQUE INDEX one_trial_per_name ON activations (name) WHERE state = 'trial';
CREATE INDEX jobs_by_model ON jobs (model_digest, finished_at);

CREATE TABLE model_lines (            -- what the signed index of a model line forbids; it only becomes stricter
  name TEXT PRIMARY KEY,
  minimum_version TEXT NOT NULL,
  withdrawn TEXT NOT NULL DEFAULT '{}',-- JSON: version -> reason
  updated_at TEXT NOT NULL
) STRICT;

-- migration 3: volumes
ALTER TABLE jobs ADD COLUMN series_id INTEGER REFERENCES series (id); -- of a job that analyses a series; its image is the first of the series
CREATE INDEX jobs_by_series ON jobs (series_id) WHERE series_id IS NOT NULL;

CREATE TABLE volumes (                -- the segmentation of a series by a model
  job_id INTEGER PRIMARY KEY REFERENCES jobs (id),
  series_id INTEGER NOT NULL REFERENCES series (id),
  model TEXT NOT NULL, model_version TEXT NOT NULL, model_digest TEXT NOT NULL,
  precision TEXT NOT NULL, runtime TEXT NOT NULL,
  geometry TEXT NOT NULL,             -- JSON: shape and affine (LPS, mm) of the mask, and which image and frame each slice is
  mask BLOB NOT NULL                  -- zlib of uint8 [slices, rows, columns], index into the classes of geometry
) STRICT;
CREATE INDEX volumes_by_series ON volumes (series_id);

CREATE TABLE measurements (
  id INTEGER PRIMARY KEY,
  job_id INTEGER NOT NULL REFERENCES volumes (job_id),
  label TEXT NOT NULL, code TEXT NOT NULL, title_zh TEXT NOT NULL, title_en TEXT NOT NULL,
  value REAL NOT NULL, unit TEXT NOT NULL,
  UNIQUE (job_id, label)
) STRICT;

CREATE TABLE key_pictures (           -- planes through the centre of the segmentation, with its outline
  job_id INTEGER NOT NULL REFERENCES volumes (job_id),
  plane TEXT NOT NULL CHECK (plane IN ('axial', 'coronal', 'sagittal')),
  png BLOB NOT NULL,
  PRIMARY KEY (job_id, plane)
) STRICT;

-- migration 4: urgent studies, and who made them urgent
ALTER TABLE studies ADD COLUMN urgent TEXT; -- JSON (appliance/store/priority.py); NULL: not urgent
ALTER TABLE studies ADD COLUMN not_urgent TEXT; -- JSON: who made it routine again; from then on requests of its sender are ignored
ALTER TABLE instances ADD COLUMN requested_procedure_priority TEXT NOT NULL DEFAULT ''; -- (0040,1003), one of its defined terms
UPDATE studies SET urgent = json_object('origin', 'cli', 'actor', 'cli', 'at', '', 'term', '') -- only the command line could; the time was not recorded
  WHERE EXISTS (SELECT 1 FROM series s JOIN instances i ON i.series_id = s.id JOIN jobs j ON j.instance_id = i.id
    WHERE s.study_id = studies.id AND j.priority > 0);

-- migration 5: job.memory had two meanings; no memory before the model ran is a code of its own
UPDATE jobs SET reason = json_set(reason, '$.code', 'job.memory_input', '$.detail', '')
  WHERE json_extract(reason, '$.code') = 'job.memory' AND json_extract(reason, '$.detail') = 'before the model';
UPDATE instances SET reason = json_set(reason, '$.code', 'job.memory_input', '$.detail', '')
  WHERE json_extract(reason, '$.code') = 'job.memory' AND json_extract(reason, '$.detail') = 'before the model';

-- migration 6: what a person decided to do with an image that the input check doubts (appliance/core/correction.py)
ALTER TABLE instances ADD COLUMN correction TEXT NOT NULL DEFAULT '';

-- migration 7: accuracy is shown only where the gate record matches weights and threshold; of earlier findings that was not recorded
ALTER TABLE findings ADD COLUMN has_verified_accuracy INTEGER NOT NULL DEFAULT 0 CHECK (has_verified_accuracy IN (0, 1));

-- migration 8: contours inside the outline of a finding; of earlier findings there is the outline alone
ALTER TABLE findings ADD COLUMN inner_contours TEXT NOT NULL DEFAULT '[]'; -- JSON: level and polygons of each

-- migration 9: the alarm for shifted scores, per label and model version
CREATE TABLE score_monitors (
  digest TEXT NOT NULL, label TEXT NOT NULL,
  last_finding INTEGER NOT NULL,      -- findings up to this one were taken into account
  first_finding INTEGER NOT NULL,     -- findings up to this one precede the comparison: of one study the first finding after it counts
  studies INTEGER NOT NULL,           -- studies since then
  compares_reference INTEGER NOT NULL,-- 0: an administrator acknowledged an alarm, so the box is compared with its own history alone
  evidence TEXT NOT NULL,             -- JSON (appliance/lifecycle/score_shift.py)
  alarm TEXT,                         -- JSON note with its time (at); NULL: none, or acknowledged
  PRIMARY KEY (digest, label)
) STRICT;

-- migration 10: the accuracy that applies to the patient of a finding
ALTER TABLE findings ADD COLUMN accuracy TEXT; -- JSON (appliance/core/applicable_accuracy.py); NULL: an earlier version made the finding; determined when it is read

-- migration 11: five roles, accounts that can be disabled, passwords and sessions whose age does not depend on the wall clock
ALTER TABLE users ADD COLUMN is_active INTEGER NOT NULL DEFAULT 1 CHECK (is_active IN (0, 1));
ALTER TABLE users ADD COLUMN password_set_at TEXT NOT NULL DEFAULT ''; -- moment (appliance/core/moments.py)
ALTER TABLE users ADD COLUMN former_hashes TEXT NOT NULL DEFAULT '[]';  -- JSON: hashes of earlier passwords, newest first
ALTER TABLE users ADD COLUMN last_login_at TEXT NOT NULL DEFAULT '';   -- moment
ALTER TABLE users ADD COLUMN former_role TEXT; -- the role before this migration, until its change is in the audit
ALTER TABLE users DROP COLUMN failures;        -- a name is never locked everywhere; the limits are in memory (model_sync/login_throttle.py)
ALTER TABLE users DROP COLUMN locked_until;
UPDATE users SET password_set_at = printf('%.3f 0 -', (julianday('now') - 2440587.5) * 86400); -- not recorded: counts from now
UPDATE users SET former_role = role, role = 'clinician' WHERE role = 'administrator'; -- keeps its access to patients (ADR 0040)
DROP TABLE sessions;                           -- everybody logs in once more
CREATE TABLE sessions (
  id INTEGER PRIMARY KEY,
  token_sha256 TEXT NOT NULL UNIQUE,
  user_id INTEGER NOT NULL REFERENCES users (id),
  created_at TEXT NOT NULL,           -- moment
  seen_at TEXT NOT NULL,              -- moment of the last request that a person made
  confirmed_at TEXT NOT NULL,         -- moment when the password was last typed
  needs_code INTEGER NOT NULL DEFAULT 0 CHECK (needs_code IN (0, 1)), -- the password was right, the code of the second factor is outstanding
  peer TEXT NOT NULL
) STRICT;
CREATE INDEX sessions_by_user ON sessions (user_id);

-- migration 12: the key of the audit is known, and an audit without entries has a sealed head: removing all of them is found
INSERT OR REPLACE INTO meta VALUES ('audit_key_check', audit_seal('key'));
INSERT OR IGNORE INTO meta SELECT 'audit_head', audit_seal('0 0000000000000000000000000000000000000000000000000000000000000000')
  WHERE NOT EXISTS (SELECT 1 FROM audit);

-- migration 13: an attempt that a new boot of the machine ended is no crash of the model (appliance/core/attempts.py)
ALTER TABLE activations ADD COLUMN boot_id TEXT NOT NULL DEFAULT ''; -- of the boot in which the attempt began; on trial, in which the worker started
ALTER TABLE activations ADD COLUMN interrupted INTEGER NOT NULL DEFAULT 0; -- attempts that a new boot ended

-- migration 14: results that a person took back with the decision that they rest on (appliance/store/taken_back.py)
CREATE TABLE superseded_findings (    -- rows of findings, moved; their ids are never used again
  id INTEGER PRIMARY KEY,
  instance_id INTEGER NOT NULL REFERENCES instances (id),
  correction TEXT NOT NULL,           -- what the person had decided (appliance/core/correction.py)
  at TEXT NOT NULL, actor TEXT NOT NULL, -- when and who took it back
  finding TEXT NOT NULL,              -- JSON: the columns of findings but the heat map
  heatmap_png BLOB NOT NULL
) STRICT;
CREATE INDEX superseded_by_instance ON superseded_findings (instance_id);

-- migration 15: second factor (appliance/store/second_factor.py)
ALTER TABLE users ADD COLUMN totp_secret BLOB;  -- encrypted by accounts.key; NULL: none
ALTER TABLE users ADD COLUMN totp_pending BLOB; -- the same, while it is being set up
CREATE TABLE used_codes (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  user_id INTEGER NOT NULL REFERENCES users (id),
  step INTEGER NOT NULL,              -- seconds since the epoch / 30
  UNIQUE (user_id, step)
) STRICT;
CREATE TABLE recovery_codes (
  user_id INTEGER NOT NULL REFERENCES users (id),
  code_sha256 TEXT NOT NULL,
  PRIMARY KEY (user_id, code_sha256)
) STRICT;

-- migration 16: emergency access (appliance/store/emergency_access.py)
CREATE TABLE emergency_accesses (
  id INTEGER PRIMARY KEY,
  user_id INTEGER NOT NULL REFERENCES users (id),
  reason TEXT NOT NULL,
  began_at TEXT NOT NULL,             -- moment
  duration_s REAL NOT NULL,
  has_ended INTEGER NOT NULL DEFAULT 0 CHECK (has_ended IN (0, 1)), -- 1: the person ended it before its time
  seen_by TEXT NOT NULL DEFAULT ''    -- the security administrator who looked at it
) STRICT;
CREATE INDEX emergency_accesses_by_user ON emergency_accesses (user_id);

-- migration 17: API tokens for programs (appliance/store/api_tokens.py)
CREATE TABLE api_tokens (
  id INTEGER PRIMARY KEY AUTOINCREMENT,-- never used again: the audit names tokens by it
  token_sha256 TEXT NOT NULL UNIQUE,
  user_id INTEGER NOT NULL REFERENCES users (id),
  scopes TEXT NOT NULL,               -- JSON: list of scopes (appliance/core/roles.py)
  created_at TEXT NOT NULL,           -- moment
  created_by TEXT NOT NULL,
  lifetime_s REAL NOT NULL,           -- 0: has expired, whatever the clock says later
  last_used_at TEXT NOT NULL DEFAULT '' -- moment; empty before the first use
) STRICT;
CREATE INDEX api_tokens_by_user ON api_tokens (user_id);
CREATE TABLE api_token_addresses (    -- the machines that used a token, the latest of them
  token_id INTEGER NOT NULL REFERENCES api_tokens (id) ON DELETE CASCADE,
  address TEXT NOT NULL,              -- of IPv6 the /64 network
  last_used_at TEXT NOT NULL,         -- moment
  PRIMARY KEY (token_id, address)
) STRICT;

-- migration 18: what belongs to one session and ends with it (appliance/store/second_factor.py, appliance/store/logins.py)
ALTER TABLE sessions ADD COLUMN totp_pending BLOB; -- the second factor that is being set up in it, encrypted by accounts.key
ALTER TABLE sessions ADD COLUMN wrong_secrets INTEGER NOT NULL DEFAULT 0; -- wrong passwords and codes typed in it since the last right ones
ALTER TABLE users DROP COLUMN totp_pending;
