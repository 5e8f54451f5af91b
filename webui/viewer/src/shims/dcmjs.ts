/**
 * Stands in for `dcmjs`. Cornerstone's packages take two things of it: the logger, which dcmjs itself has from
 * loglevel, and four transfer syntaxes (DICOM PS3.6 Annex A). Parsing DICOM is the box's work, never the browser's.
 */
import log from "loglevel";

export { log };

export const constants = {
  IMPLICIT_LITTLE_ENDIAN: "1.2.840.10008.1.2",
  EXPLICIT_LITTLE_ENDIAN: "1.2.840.10008.1.2.1",
  DEFLATED_EXPLICIT_LITTLE_ENDIAN: "1.2.840.10008.1.2.1.99",
  EXPLICIT_BIG_ENDIAN: "1.2.840.10008.1.2.2",
};
