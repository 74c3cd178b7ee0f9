-- Orthanc hook: when a study has been stable for a while, send its images to edgemed, each set of images once.
--
-- edgemed sends its results back by C-STORE; they carry the study's UIDs, so Orthanc files them in the same study. That
-- makes the study stable once more, and this hook runs again: the number of images that were sent is kept with the study
-- (metadata EdgemedSent, named in orthanc.json), and results are no images, so nothing goes round in circles.

local NODE = 'edgemed'  -- its name in DicomModalities
local IMAGES = { CT = true, MR = true, CR = true, DX = true, MG = true, US = true, XA = true, RF = true,
                 NM = true, PT = true }

function OnStableStudy(studyId, tags, metadata)
   local images, count = {}, 0
   for _, series in ipairs(ParseJson(RestApiGet('/studies/' .. studyId .. '/series', false))) do
      if IMAGES[series['MainDicomTags']['Modality']] then
         table.insert(images, series['ID'])
         count = count + #series['Instances']
      end
   end
   if count == 0 or metadata['EdgemedSent'] == tostring(count) then
      return
   end
   -- One job, one association; a node that is down leaves a failed job, which Orthanc's /jobs can resubmit.
   RestApiPost('/modalities/' .. NODE .. '/store',
               DumpJson({ Resources = images, Synchronous = false }, true), false)
   RestApiPut('/studies/' .. studyId .. '/metadata/EdgemedSent', tostring(count), false)
end
