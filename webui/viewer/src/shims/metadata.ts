/**
 * The part of `@cornerstonejs/metadata` that the image core uses, under the package's own names.
 *
 * The package's entry point also pulls in a DICOM parser, display-set rules and SUV calculation (1.1 MB of source).
 * The build puts this module in its place (vite.config.mjs); a name that the core needs and that is missing here
 * fails the build, not the page.
 */
export * as metaData from "@cornerstonejs/metadata/metaData";
export * as Enums from "@cornerstonejs/metadata/enums";
export * as utilities from "./metadataUtilities";
