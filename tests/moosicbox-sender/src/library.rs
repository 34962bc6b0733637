//! A library in which every track is the same file. Only what `/files/track` asks is there.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, LazyLock},
};

use async_trait::async_trait;
use moosicbox_menu_models::AlbumVersion;
use moosicbox_music_api::{
    Error, MusicApi, TrackOrId,
    models::{
        AlbumOrder, AlbumOrderDirection, AlbumsRequest, ArtistOrder, ArtistOrderDirection, TrackAudioQuality, TrackOrder,
        TrackOrderDirection, TrackSource,
    },
};
use moosicbox_music_models::{
    Album, AlbumType, ApiSource, Artist, AudioFormat, PlaybackQuality, Track, TrackApiSource, id::Id,
};
use moosicbox_paging::{PagingResponse, PagingResult};

static SOURCE: LazyLock<ApiSource> = LazyLock::new(ApiSource::library);

pub fn add_profile(name: &str, track: PathBuf) {
    let track = track.to_str().expect("text").to_owned();
    let library: Arc<Box<dyn MusicApi>> = Arc::new(Box::new(Library { track }));
    let apis = BTreeMap::from([(SOURCE.clone(), library)]);
    moosicbox_music_api::profiles::PROFILES.add(name.to_owned(), Arc::new(apis));
}

struct Library {
    track: String,
}

#[async_trait]
impl MusicApi for Library {
    fn source(&self) -> &ApiSource {
        &SOURCE
    }

    async fn track(&self, id: &Id) -> Result<Option<Track>, Error> {
        Ok(Some(Track {
            id: id.clone(),
            track_source: TrackApiSource::Local,
            api_source: SOURCE.clone(),
            ..Track::default()
        }))
    }

    async fn track_source(&self, _: TrackOrId, _: TrackAudioQuality) -> Result<Option<TrackSource>, Error> {
        Ok(Some(TrackSource::LocalFilePath {
            path: self.track.clone(),
            format: AudioFormat::Source,
            track_id: None,
            source: TrackApiSource::Local,
        }))
    }

    async fn artists(
        &self,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<ArtistOrder>,
        _: Option<ArtistOrderDirection>,
    ) -> PagingResult<Artist, Error> {
        Ok(PagingResponse::empty())
    }

    async fn artist(&self, _: &Id) -> Result<Option<Artist>, Error> {
        Ok(None)
    }

    async fn add_artist(&self, _: &Id) -> Result<(), Error> {
        Ok(())
    }

    async fn remove_artist(&self, _: &Id) -> Result<(), Error> {
        Ok(())
    }

    async fn albums(&self, _: &AlbumsRequest) -> PagingResult<Album, Error> {
        Ok(PagingResponse::empty())
    }

    async fn album(&self, _: &Id) -> Result<Option<Album>, Error> {
        Ok(None)
    }

    async fn album_versions(&self, _: &Id, _: Option<u32>, _: Option<u32>) -> PagingResult<AlbumVersion, Error> {
        Ok(PagingResponse::empty())
    }

    async fn artist_albums(
        &self,
        _: &Id,
        _: Option<AlbumType>,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<AlbumOrder>,
        _: Option<AlbumOrderDirection>,
    ) -> PagingResult<Album, Error> {
        Ok(PagingResponse::empty())
    }

    async fn add_album(&self, _: &Id) -> Result<(), Error> {
        Ok(())
    }

    async fn remove_album(&self, _: &Id) -> Result<(), Error> {
        Ok(())
    }

    async fn tracks(
        &self,
        _: Option<&[Id]>,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<TrackOrder>,
        _: Option<TrackOrderDirection>,
    ) -> PagingResult<Track, Error> {
        Ok(PagingResponse::empty())
    }

    async fn album_tracks(
        &self,
        _: &Id,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<TrackOrder>,
        _: Option<TrackOrderDirection>,
    ) -> PagingResult<Track, Error> {
        Ok(PagingResponse::empty())
    }

    async fn add_track(&self, _: &Id) -> Result<(), Error> {
        Ok(())
    }

    async fn remove_track(&self, _: &Id) -> Result<(), Error> {
        Ok(())
    }

    async fn track_size(&self, _: TrackOrId, _: &TrackSource, _: PlaybackQuality) -> Result<Option<u64>, Error> {
        Ok(None)
    }
}
