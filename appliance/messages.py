"""The coded texts of the box: what happened and what to do; :mod:`model_sync.messages` has those that reports carry.

Every refusal, assumption, caution and failure that a person may see has a code, so that "not analysed" never looks like
"negative" and page, JSON and structured report use the same words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from model_sync.messages import Message, register, text

DISCLAIMER: Final = {"zh": "不得单独作为诊断依据", "en": "Not for sole diagnosis"}

_RESTORE: Final = "Restore it: appliance keys restore FILE --data-dir DIR. Without an escrow copy delete nothing and tell the central team."
# fmt: off  (a table reads best with one code in a line)
_SENDER: Final = "Nothing was kept. Export the image again from its source and send it once more."
_NOTHING: Final = "Nothing to do."
_TURN: Final = "If the check is right, open the study and press the button that corrects the image and analyses it; else the one that analyses it as it is."
_RETAKE: Final = "The image is kept but was not analysed. Check the exposure and take or export it again."
_DECODER: Final = "The file is kept as it came, but this box can neither analyse nor show it. Send it again uncompressed, or read the image at its source."
_NO_MODEL: Final = "The image is kept and can be viewed; no model on this box analyses it. A doctor must read it."
_RETRY: Final = "The image is kept. Press “Retry”; if it fails again, read the image without AI and call the technician."
_VOLUME: Final = "The images are kept and can be viewed, but the volume was not analysed. A doctor must read them without AI."
_SERIES: Final = "The images are kept and can be viewed, but the volume was not analysed. Check that the series is complete and send all of it again from the scanner; otherwise read it without AI."
_MEASURE: Final = "Raise tune_measuring_s or activation_deadline_s and run `appliance tune`."
_PAIR: Final = "Put certificate and key from the same order in place; `appliance tls status` checks them. A page that is running goes on with the pair before."
_RENEW: Final = "Get a new one from the clinic or the county and put it in the place of the old one; the box takes it within a minute."
_ORIGINAL: Final = "The images are kept and can be viewed. Where there is an original series of the kind the model was made for, send that one; otherwise read it without AI."

_CODES: Final[Mapping[str, Message]] = {
    "ingest.not_dicom": Message("Not a DICOM file", "Choose a DICOM, PNG or JPEG file."),
    "ingest.empty": Message("The file is empty (0 bytes)", _SENDER),
    "ingest.truncated": Message("The file is cut short", _SENDER),
    "ingest.unreadable": Message("The DICOM file is damaged and cannot be read", _SENDER),
    "ingest.no_pixel_data": Message("The file holds no image", "Reports, waveforms and other non-image objects are not kept here."),
    "ingest.too_large": Message("The file is larger than allowed", "Ask the technician about the setting max_upload_bytes."),
    "ingest.absurd_dimensions": Message("The image size or the number of frames is too large or does not match the data", _SENDER),
    "ingest.unsupported_syntax": Message(
        "Unsupported compression (transfer syntax)", "Export again uncompressed or as JPEG, JPEG-LS, JPEG 2000 or RLE."
    ),
    "ingest.pixel_representation": Message("Pixel Representation (signed or unsigned) is missing or wrong", _SENDER),
    "ingest.pixel_attributes": Message("Pixel attributes are missing or contradict each other", _SENDER),
    "ingest.nested_archive": Message(
        "A packed file of this kind, or inside an archive, is not unpacked",
        "Unpack it on your computer and send its images, or one ZIP of them.",
    ),
    "ingest.not_closed": Message("The compressed image is not closed and may be incomplete", _SENDER),
    "ingest.pixels": Message("The compressed pixel data is damaged", _SENDER),
    "ingest.missing_uid": Message("A required UID is missing", _SENDER),
    "ingest.invalid_uid": Message("A UID has forbidden characters or is too long", _SENDER),
    "ingest.conflict": Message(
        "Another image with the same SOP Instance UID but other content is stored too; both are kept",
        "Check which patient each image belongs to and tell the technician.",
    ),
    "ingest.archive_unsafe": Message("The archive holds an unsafe path; the entry was skipped", "Make the archive again."),
    "ingest.archive_bomb": Message("The archive unpacks to more than is allowed", "Upload it in smaller archives."),
    "ingest.archive_encrypted": Message("The archive is encrypted and cannot be opened", "Upload an archive without a password."),
    "ingest.archive_corrupt": Message("The archive is damaged", "Make the archive again."),
    "ingest.too_many_files": Message("Too many files at once", "Upload them in several batches."),
    "ingest.disk_full": Message(
        "The disk is full; the file was refused and nothing stored was deleted", "Ask the technician to free disk space, then send again."
    ),
    "ingest.memory": Message(
        "Not enough memory just now; the file was not taken", "Send it again later; if it fails again call the technician."
    ),
    "ingest.decoder": Message(
        "The picture crashed its decoder, took too long or needed too much memory; it was not taken",
        "Save the picture again as PNG and upload that; if it fails again tell the technician.",
    ),
    "ingest.unsupported_image": Message("The picture cannot be read or is of an unsupported kind", "Use PNG or JPEG."),
    "ingest.interrupted": Message("The upload was interrupted", "Choose the same file again to continue where it stopped."),
    "ingest.skipped": Message("Not an image file; skipped", _NOTHING),
    "pixel.corrupt": Message(
        "The pixel data is damaged and cannot be decoded reliably",
        "The file is kept as it came but was not analysed. Send it again from its source.",
    ),
    "pixel.undecodable": Message(
        "The pixel data cannot be decoded", "The file is kept as it came but was not analysed. Send it again in another format."
    ),
    "pixel.decoder_crashed": Message("The program that decodes images crashed at this image", _DECODER),
    "pixel.decoder_deadline": Message("Decoding this image took too long and was stopped", _DECODER),
    "pixel.decoder_memory": Message("Decoding this image needs more memory than is allowed", _DECODER),
    "quality.blank": Message("The image is blank and was not analysed", _RETAKE),
    "quality.saturated": Message("The image is saturated and was not analysed", _RETAKE),
    "quality.shape": Message("The image is of an unusual shape and was not analysed", _RETAKE),
    "quality.turned": Message("The image seems to be turned and was not analysed", _TURN),
    "quality.negative": Message("The image seems to be a negative (dark and bright exchanged) and was not analysed", _TURN),
    "quality.other_image": Message(
        "The image does not look like what this model was made for, and was not analysed",
        "Read the image yourself. If it is the right kind of image, press the button to analyse it as it is.",
    ),
    "quality.too_small": Message("The image is too small and was not analysed", _RETAKE),
    "scope.modality": Message("This modality is outside the model's scope", _NO_MODEL),
    "scope.sop_class": Message("This kind of object is outside the model's scope", _NO_MODEL),
    "scope.body_part": Message("This body part is outside the model's scope", _NO_MODEL),
    "scope.view": Message("This view is outside the model's scope (for example lateral)", _NO_MODEL),
    "scope.age": Message("The patient's age is outside the model's scope", _NO_MODEL),
    "scope.frames": Message("Multi-frame images are outside the model's scope", _NO_MODEL),
    "scope.species": Message("The image is of an animal; no model is made for it", _NO_MODEL),
    "scope.quality_control": Message("The image is a quality control image, not one of a patient", _NO_MODEL),
    "scope.for_processing": Message(
        "The image is raw data for further processing, not for reading",
        "The image is kept. Send the image “for presentation” of the same exposure.",
    ),
    "scope.no_model": Message("No model is active on this box; not analysed", "The image is kept. Ask the technician to activate a model."),
    "job.deadline": Message("The analysis took too long and was stopped", _RETRY),
    "job.crashed": Message("The analysis program stopped unexpectedly", _RETRY),
    "job.memory": Message("Not enough memory; the analysis was stopped", _RETRY),
    "job.memory_input": Message("Not enough memory to decode or prepare the image; the model did not run", _RETRY),
    "job.error": Message("The analysis failed", _RETRY),
    "store.missing": Message("There is no such record", "Reload the page."),
    "store.outcome_damaged": Message(
        "The result of this upload was damaged on the disk", "Look for the image in the worklist; where it is absent, send it again."
    ),
    "store.tampered": Message("A stored file failed its integrity check", "Do not use this image; call the technician."),
    "choice.measured": Message("Measured fastest on this box", _NOTHING),
    "choice.measured_part": Message("Fastest of the measured candidates; some were not measured, for lack of time", _MEASURE),
    "choice.by_hand": Message(
        "A person chose the precision",
        "Nothing to do; `appliance models activate VERSION --precision any` undoes this and measures all of them.",
    ),
    "choice.untuned": Message(
        "Not measured: runs on the baseline", "`appliance tune` measures the candidates and uses the fastest correct one."
    ),
    "choice.fallback": Message(
        "The chosen candidate does not run; the baseline is used as fallback",
        "Results are as correct as before, perhaps slower. The box measures again by itself; if this stays, have a technician run `appliance tune`.",
    ),
    "choice.other_device": Message(
        "The chosen candidate was measured on other hardware or software",
        "The golden cases were correct on this box as it is now. It measures again when it is idle; `appliance tune` does so at any time.",
    ),
    "choice.unstable": Message(
        "The times did not agree on the fastest candidate: what ran before stays, else the baseline",
        "Other work slows this box. Run `appliance tune` when it is idle.",
    ),
    "tune.busy": Message("Other work was going on while it was measured", "Run `appliance tune` when this box is idle."),
    "tune.kept": Message("Correct, and kept: the times did not agree on the fastest", _NOTHING),
    "tune.not_stable": Message("Correct, but its times were not stable", _NOTHING),
    "tune.fastest": Message("Correct, and the fastest", _NOTHING),
    "tune.more_exact": Message("Correct, within 3 % of the fastest, and more exact", _NOTHING),
    "tune.faster_together": Message("Correct, the fastest, and still faster with several images at once", _NOTHING),
    "tune.slower": Message("Correct, but slower", _NOTHING),
    "tune.slower_less_exact": Message("Slower than a more exact one", _NOTHING),
    "tune.less_exact": Message("As fast, but less exact", _NOTHING),
    "tune.no_faster": Message("Correct, but no faster", _NOTHING),
    "tune.batch_no_faster": Message("Several images at once are no faster", _NOTHING),
    "tune.no_batch_gain": Message("Several images at once gain too little, or no more than the times vary", _NOTHING),
    "tune.other_batch": Message("Another number of images at once is better", _NOTHING),
    "tune.batch_taken": Message("Taken with several images at once", _NOTHING),
    "tune.alike": Message("The answers to different images cannot be told apart: it is not shown that each image gets its own", _NOTHING),
    "tune.unreadable": Message(
        "The record of the last measurement cannot be read and is ignored", "Run `appliance tune` to measure again."
    ),
    "tune.wrong": Message(
        "The result of a golden case is outside the tolerance", "This candidate is not used. Report the table to the central team."
    ),
    "tune.not_on": Message("Known by the central team to fail on this runtime", _NOTHING),
    "tune.no_time": Message("Not measured: no time", _MEASURE),
    "volume.no_position": Message("Slices without position, orientation or pixel spacing: no volume", _VOLUME),
    "volume.too_few_slices": Message("Too few slices for a volume", _SERIES),
    "volume.missing_slices": Message("Slices are missing from the series", _SERIES),
    "volume.duplicate_slice": Message("Several slices lie at the same position", _VOLUME),
    "volume.uneven_spacing": Message("The slices are not evenly spaced", _VOLUME),
    "volume.scattered": Message("The slices do not lie along one line", _VOLUME),
    "volume.mixed_orientation": Message("The slices have different orientations", _VOLUME),
    "volume.mixed_size": Message("The slices differ in size or pixel spacing", _VOLUME),
    "volume.mixed_kind": Message("The series mixes images of different kinds", _VOLUME),
    "volume.mixed_acquisition": Message("The series mixes acquisitions (echoes, contrast agent, reconstruction)", _VOLUME),
    "volume.no_units": Message("The values have no usable unit: the rescale of a CT or PET is incomplete, or a CT is not in HU", _VOLUME),
    "volume.bad_values": Message("The pixel values, or what the rescale makes of them, are not valid numbers", _VOLUME),
    "volume.mixed_units": Message("The grey values of the slices mean different things (rescale, units)", _VOLUME),
    "volume.mixed_scope": Message("The images of the series differ; the model applies to some of them only", _VOLUME),
    "volume.too_coarse": Message("The slices are farther apart than the model accepts", _VOLUME),
    "volume.tilt": Message("The gantry tilt is too large or contradicts the slices' positions", _VOLUME),
    "volume.too_large": Message("The volume is too large for the memory of this box", _VOLUME),
    "volume.localizer": Message("Scout views of the series were left out of the volume", "View the scout images on their own."),
    "volume.straightened": Message(
        "The gantry was tilted; the volume was straightened by the slices' positions", "Check the outline on the original slices."
    ),
    "volume.incomplete": Message(
        "Images may be missing: fewer than the scanner says, or gaps in their numbers",
        "Volumes may be too small. Check the slices at both ends; if some are missing, send the whole series again.",
    ),
    "scope.sequence": Message("The pulse sequence (echo time, repetition time or kind) is outside the model's scope", _ORIGINAL),
    "scope.image_type": Message("The images are of a kind (derived, projected, computed) that is outside the model's scope", _ORIGINAL),
    "scope.contrast_agent": Message("A contrast agent was given; that is outside the model's scope", _ORIGINAL),
    "scope.sequence_absent": Message(
        "The images do not say how they were acquired, so it is not known whether the model was made for them", _ORIGINAL
    ),
    "assume.sequence": Message(
        "The images do not say how they were acquired; treated as the sequence the model was made for", "Check which sequence it is."
    ),
    "caution.contrast_agent": Message("A contrast agent was given; the measurement may be less exact", "Use it with care."),
    "caution.sequence_unverified": Message(
        "The model does not say which pulse sequences it was made for; this was not checked",
        "Check that the sequence is one the model was made for.",
    ),
    "caution.cropped": Message(
        "Tissue lies outside the field that the model analyses; it was not measured",
        "The figures may be too small; compare them with the slices.",
    ),
    "tls.incomplete": Message("A certificate needs its key, and a key its certificate: one of the two is not set", _PAIR),
    "tls.unreadable": Message("The certificate or its key is missing, damaged or not readable by this account", _PAIR),
    "tls.key_mismatch": Message("The key belongs to another certificate", _PAIR),
    "tls.refused": Message(
        "OpenSSL refuses the certificate or its key: the key is too short, SHA-1 signs it, or the algorithm is unknown",
        "Get a new one: an RSA key of 2048 bits or more, or an ECDSA P-256 key, signed with SHA-256. A server that is running goes on with the pair before.",
    ),
    "tls.authority_unreadable": Message(
        "The certificate of the authority is missing, damaged or not readable by this account",
        "Put the PEM file of the clinic's authority where tls_authority or dicom_client_authority names it.",
    ),
    "tls.not_served": Message(
        "A server of the box does not use the certificate in the file, but another one",
        "Wait a minute. If this line stays, restart the box; its log gives the reason.",
    ),
    "tls.no_nginx": Message(
        "nginx, which serves the page to the network, is not installed", "Install it: sudo apt-get install nginx-light"
    ),
    "tls.expired": Message("The certificate has expired; browsers and DICOM devices refuse it or warn", _RENEW),
    "tls.expires_soon": Message("The certificate expires within 30 days", _RENEW),
    "tls.not_yet_valid": Message(
        "The certificate is not valid yet", "Check the date and time of the box; if they are right, get a new certificate."
    ),
    "tls.other_name": Message(
        "The certificate is made for another name than the box has",
        "Get one for the name that people type, and write that name in web_hostname.",
    ),
    "settings.invalid": Message("The settings are invalid", "Correct the settings named; `appliance settings` explains each."),
    "settings.missing": Message("There is no such folder or settings file", "Check --data-dir; for a new box make the folder first."),
    "audit.broken": Message(
        "The audit chain is broken: an entry was changed or removed", "Tell the security administrator at once and leave the disk as it is."
    ),
    # The English texts of these nine are part of the names by which problems were acknowledged: they never change.
    "audit.entries_missing": Message("entries {first} to {last} are missing"),
    "audit.entry_changed": Message("entry {seq} was changed"),
    "audit.entry_unreadable": Message("entry {seq} cannot be read"),
    "audit.entry_differs": Message("entry {seq} differs from an anchor"),
    "audit.end_changed": Message("the end after entry {seq}"),
    "audit.anchored_entry_missing": Message("entry {seq}, of which there is an anchor, is missing"),
    "audit.break_recorded": Message("entry {seq}, of {at}, records a break ({code})"),
    "audit.anchor_changed": Message("line {number} of {name} was changed"),
    "audit.anchors_shortened": Message("{name} has been shortened or replaced"),
    "audit.certificate": Message(
        "The syslog server's certificate is not trusted; nothing was sent to it, and no entry of the audit is lost",
        "Check audit_syslog and audit_syslog_ca in the settings. If they are right, tell the security administrator.",
    ),
    "audit.unreachable": Message(
        "The syslog server does not answer; the entries of the audit wait on the box and are sent later",
        "Check the network and the server; the box tries again by itself.",
    ),
    "box.busy": Message("Another program is using this data directory", "Stop it first, or use another --data-dir."),
    "box.port": Message(
        "The box cannot listen on a port",
        "Stop the program that uses the port (sudo ss -ltnp lists them), or set another port in box.toml. Ports below 1024 need a permission of the system.",
    ),
    "box.none": Message("There is no box in this folder", "Check --data-dir: it should hold box.sqlite3. Nothing was written."),
    "key.missing": Message(
        "A key of this box is lost or damaged; the box does not start. All data are kept, nothing was changed", _RESTORE
    ),
    "key.wrong": Message(
        "A key does not belong to the data of this box; the box does not start. All data are kept, nothing was changed", _RESTORE
    ),
    "key.accounts": Message(
        "The key of the second factors (accounts.key) is lost, damaged or of another box; the box does not start. All data are kept, nothing"
        " was changed",
        "Restore it from the escrow copy: appliance keys restore FILE --data-dir DIR. Without a copy of it: appliance keys"
        " forget-second-factors --reason TEXT --data-dir DIR; then everybody sets up a new second factor at the next login.",
    ),
    "key.sealed_elsewhere": Message(
        "This machine cannot unseal the keys of this box: the disk is of another machine, or the TPM does not answer; the box does not start."
        " All data are kept, nothing was changed",
        "Start it on its own machine, or restore the keys here: appliance keys restore FILE --data-dir DIR."
        " Without an escrow copy delete nothing and tell the central team.",
    ),
    "key.not_sealed": Message(
        "The keys of this box are not sealed by its machine: whoever takes the whole disk can open the images",
        "If the machine has a TPM 2.0, install tpm2-tools, give the account of the box access to it, and start the box again."
        " Lock the box away, and erase its disk before it leaves the clinic.",
    ),
    "box.wiping": Message(
        "The wipe of this box has begun; it does not start again", "Finish it: appliance wipe --data-dir DIR. Then it can be set up anew."
    ),
    "wipe.not_approved": Message(
        "The wipe was not approved; nothing was deleted",
        "A system administrator and a security administrator must each give user name, password and the code of the second factor.",
    ),
    "key.other_box": Message("The escrow copy is of another box; nothing was changed", "Take the escrow copy of this box."),
    "key.escrow_old": Message(
        "The escrow copy is too old: the box has got new keys since; nothing was changed", "Take the latest escrow copy of this box."
    ),
    "key.no_escrow": Message("The file is no escrow copy, or it is damaged; nothing was changed", "Take another copy of the file."),
    "key.passphrase": Message("The passphrase does not open the escrow copy; nothing was changed", "Type it again."),
    "key.weak_passphrase": Message(
        "The passphrase is too short: at least 12 characters; nothing was written", "Take four or five words that belong to nobody."
    ),
    "account.wrong_password": Message("The current password is wrong", "Type it again."),
    "account.weak_password": Message(
        "The new password is too short or too simple: at least 8 characters, 4 of them different", "Choose another one."
    ),
    "account.long_password": Message("The new password is longer than 256 characters", "Choose a shorter one."),
    "account.common_password": Message(
        "The new password is one that is guessed first: a common word, a name, a date or a row of keys",
        "Choose another one, for example three words that do not belong together.",
    ),
    "account.password_classes": Message(
        "The new password needs three of these: small letters, capital letters, digits, signs", "Choose another one."
    ),
    "account.reused_password": Message("The new password was used before", "Choose another one."),
    "account.wrong_code": Message(
        "The code does not fit", "Type the code that the app shows now. If it still does not fit, compare the clocks of phone and box."
    ),
    "account.exists": Message(
        "There is already an account of this name", "Nothing was changed. Choose another name, or change the account that is there."
    ),
    "account.unknown": Message("There is no account of this name", "Nothing was changed. `appliance user list` shows the names."),
    "account.name": Message(
        "This cannot be a user name", "Use up to 64 letters, digits, dots, dashes or @, no blank and no word of a command."
    ),
    "account.session_ended": Message("A wrong password or code was typed five times; you are logged out", "Log in again."),
    "account.role": Message(
        "There is no such role", "Nothing was changed. Roles: clinician, technician, system_administrator, security_administrator, auditor."
    ),
    "account.last_administrator": Message(
        "This is the last security administrator", "Nothing was changed. Give another account this role first."
    ),
    "emergency.reason": Message(
        "The reason is too short", "Nothing was changed. Say in at least 10 characters why it cannot wait for a clinician."
    ),
    "emergency.running": Message("This emergency access has not ended yet", "Nothing was changed. Acknowledge it when it has ended."),
    "account.disabled": Message("This account is disabled", "Nothing was changed. Enable it first, or take another account."),
    "account.scope": Message(
        "No API token can be made with these scopes for this account",
        "Nothing was changed. Choose upload, results or both, and the account of a clinician.",
    ),
    "account.token_days": Message("An API token works for 1 to 365 days", "Nothing was changed. Give a whole number of days."),
    "account.token_unknown": Message(
        "There is no API token of this number", "Nothing was changed. `appliance user token list` shows them."
    ),
    "account.token_second_address": Message(
        "An API token was used from a second machine; it may have been copied",
        "Ask whose machine this is. If nobody knows, revoke the token and make a new one.",
    ),
    "account.not_allowed": Message("Your account may not do this", "Nothing was changed. Ask the security administrator of this box."),
    "assume.body_part": Message("No body part is stated; treated as a chest", "Check that the image shows a chest."),
    "assume.body_part_described": Message(
        "No body part is stated; it was taken from the description", "Check that the image shows this body part."
    ),
    "assume.view_frontal": Message("The view is stated as frontal, without PA or AP", "Nothing to do if the image is a frontal view."),
    "assume.view": Message("No view is stated; treated as frontal", "Check that the image is a frontal view."),
    "caution.body_part_conflict": Message(
        "The description names another body part than the image states", "Check that the image shows the body part it states."
    ),
    "caution.body_part_several": Message("The image shows more body parts than the model is made for", "Use the score with care."),
    "caution.turned": Message(
        "The image was turned or mirrored as its header says, for the analysis and on this page",
        "Check that it is upright and that left and right are correct.",
    ),
    "caution.orientation_reversed": Message(
        "The header says that the film lies on its side, but on the wrong one; it was turned upright by the picture",
        "Check that it is upright and that left and right are correct; tell the technician about the sender.",
    ),
    "caution.turned_by_person": Message("A person had the image turned before the analysis", "Check that it is upright and not mirrored."),
    "caution.inverted_by_person": Message(
        "A person had dark and bright of the image exchanged before the analysis", "Check that the lungs are dark and the bones bright."
    ),
    "caution.input_doubted": Message(
        "The input check doubted the image; a person had it analysed nevertheless", "Use the score with special care."
    ),
    "caution.evidence_outside_body": Message(
        "What contributed most to the score lies outside the body, such as a marker or a border",
        "Do not rely on the score; look at the heat map.",
    ),
    "caution.decimal_comma": Message(
        "A number in the header has a decimal comma; it was read as a point",
        "Nothing to do; the technician can tell the maker of the sender.",
    ),
    "caution.window": Message(
        "The window in the header is invalid; another one was used for the analysis",
        "Check brightness and contrast; use the score with care.",
    ),
    "caution.lut_short": Message(
        "A look-up table of the header lacks its last entries; they were completed",
        "Check brightness and contrast; use the score with care.",
    ),
    "caution.repaired": Message(
        "The file broke the DICOM format; it was repaired without changing its pixels",
        "Nothing to do; the technician can tell the maker of the sender.",
    ),
    "caution.text_encoding": Message(
        "The header states another character set than its text is written in",
        "Check the patient's name. The technician can correct the setting of the sender.",
    ),
    "caution.text_doubtful": Message(
        "The character set of a text is unclear; it may be shown wrongly", "Check the patient's name against the request."
    ),
    "caution.long_uid": Message(
        "A UID is longer than the standard allows", "Nothing to do; the technician can tell the maker of the sender."
    ),
    "caution.age_unknown": Message(
        "The patient's age is unknown, so it is not known whether the model was trained for it", "Use the score with care."
    ),
    "caution.age_outside": Message(
        "The patient's age is outside the range most of the training pictures came from; accuracy may be lower", "Use the score with care."
    ),
    "caution.photograph": Message(
        "The image is a photographed film or plain picture; accuracy may be lower", "Use the original DICOM image where there is one."
    ),
    "caution.view_from_form": Message("The view was stated by the person who uploaded it", "Check it."),
    "caution.missing_uid": Message("The image lacks its study or series UID; it is kept as a study of its own", "Check patient and study."),
    "caution.patient_mismatch": Message("The same study UID came with other patient data; kept apart", "Check the patient's identity."),
}
# fmt: on
register("appliance", _CODES)


def both_languages(code: str, detail: str = "") -> dict[str, str]:
    """A code with its text in both languages, as the JSON for programs has it."""
    return {"code": code, "zh": text(code, "zh"), "en": text(code, "en"), "detail": detail}
